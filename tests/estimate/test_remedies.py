"""The settings that a plan proposes to save memory change the run and its stages and streams."""

from __future__ import annotations

from megalard.estimate.remedies import changes
from tests.config.loading import load

STREAMS = "{s: {objective: {relations: {q: 1}}}, t: {objective: {language_modelling: 1}}}"


def test_a_change_is_made_in_every_stage_and_stream():
    """The run has one stage with streams and one without."""
    config = load(
        f"--stages={{a: {{streams: {STREAMS}}}, b: {{trainable: {{mode: all}}}}}}",
        "--optimizer.micro_batch=4",
        "--data.context_length=4096",
    )
    by_setting = {change.setting: change.apply(config) for change in changes(config)}

    def of_streams(setting: str, value) -> list:
        stages = by_setting[setting].all_stages().values()
        return [value(stream) for stage in stages for stream in stage.all_streams().values()]

    assert of_streams("micro_batch 1", lambda stream: stream.micro_batch) == [1, 1, 1]
    lengths = of_streams("data.context_length 2048", lambda stream: stream.data.context_length)
    assert lengths == [2048, 2048, 2048]
    ranks = [
        stage.trainable.lora.rank
        for stage in by_setting["trainable.lora.rank 64"].all_stages().values()
    ]
    assert ranks == [64, 64]
    modes = [
        stage.trainable.mode for stage in by_setting["trainable.mode weights"].all_stages().values()
    ]
    assert modes == ["lora", "weights"]


def test_a_run_without_stages_is_changed_itself():
    config = load("--optimizer.micro_batch=4", "--data.context_length=3000")
    by_setting = {change.setting: change.apply(config) for change in changes(config)}
    assert by_setting["micro_batch 1"].optimizer.micro_batch == 1
    assert by_setting["data.context_length 1500"].data.context_length == 1500
    assert by_setting["parallel.offload true"].parallel.activation_checkpointing
    assert by_setting["parallel.offload_optimizer true"].parallel.offload_optimizer
