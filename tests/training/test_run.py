"""The parts of a run together: exports at intervals, tokens done, and settings that reach it."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megalard.config.schema import CheckpointConfig
from megalard.training.output import open_output
from megalard.training.run import Run
from tests.command_line import megalard
from tests.jobs import STEPS, arguments, interrupted, make_job, metrics, snapshot, train


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job with a run that exports every second step."""
    folder = make_job(tmp_path_factory.mktemp("run"))
    options = ("checkpoint.save_every=2", "checkpoint.keep_last=9", "checkpoint.export_every=2")
    train(arguments(folder, folder / "run", *options))
    return folder


EXPORTS = ("checkpoint.save_every=2", "checkpoint.keep_last=9", "checkpoint.export_every=2")


def exports(output) -> list[str]:
    """Return the names of the exported students of a run."""
    return sorted(path.parent.name for path in output.glob("*/config.json"))


def test_the_student_is_exported_at_the_interval_and_at_the_end(job, tmp_path):
    assert exports(job / "run") == ["step-000002", "step-000004", "step-000006", "student"]
    # The export of a step is what a run of that many steps with the same schedule leaves.
    shorter = tmp_path / "shorter"
    options = ("checkpoint.save_every=4", "optimizer.min_ratio=1")
    train(arguments(job, shorter, *options, "optimizer.steps=4"))
    longer = tmp_path / "longer"
    train(arguments(job, longer, *options, "checkpoint.export_every=4"))
    ours = load_file(longer / "step-000004" / "model.safetensors")
    for name, value in load_file(shorter / "student" / "model.safetensors").items():
        assert torch.equal(ours[name], value), name


def test_an_export_that_a_killed_run_did_not_make_is_made_up(job, tmp_path):
    output = interrupted(job / "run", tmp_path / "output")
    complete = snapshot(output / "step-000004")
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(output / name)
    train(arguments(job, output, *EXPORTS))
    assert exports(output) == exports(job / "run")
    assert snapshot(output / "step-000004") == complete


def test_an_export_that_is_there_is_not_made_again(job, tmp_path):
    output = interrupted(job / "run", tmp_path / "output")
    (output / "step-000004" / "model.safetensors").write_text("mine")
    train(arguments(job, output, *EXPORTS))
    assert (output / "step-000004" / "model.safetensors").read_text() == "mine"


def test_the_export_that_is_due_at_the_end_of_a_stage_is_made(tmp_path):
    """Steps 2 and 4 of six are due; step 4 ends the first stage, and step 6 is exported anyway."""
    exports = []
    for number in range(7):
        run = SimpleNamespace(
            config=SimpleNamespace(checkpoint=CheckpointConfig(export_every=2), steps=6),
            stage=SimpleNamespace(last_step=4 if number <= 4 else 6),
            steps_done=number,
            output=SimpleNamespace(directory=tmp_path),
            _export=exports.append,
        )
        Run.export_if_due(run)
    assert exports == ["step-000002", "step-000004"]


def test_a_run_is_built_resumed_and_stepped(planned):
    """From Python, as ``megalard.train`` does it."""
    run = planned("stages={a: {}, b: {optimizer: {global_batch: 8}}}", "optimizer.steps=2")
    with open_output(run.config, run.mesh) as output:
        built = Run(run.config, run.plan, output, run.mesh)
        built.resume()
        restarts, restart = [], built.monitor.restart_clock
        built.monitor.restart_clock = lambda step: restarts.append(step) or restart(step)
        assert built.validator.first_step == 3, "the first step of the last stage"
        with built.saver:
            assert [stage.name for stage in built.stages_left()] == ["a", "b"]
            for stage in built.stages_left():
                built.begin(stage)
                for number in stage.steps_after(built.steps_done):
                    built.step(stage, number)
            assert built.stages_left() == [] and built.steps_done == 4
            # Two steps of 4 blocks and two of 8 blocks of 32 tokens.
            assert built._tokens_after(built.steps_done) == (2 * 4 + 2 * 8) * 32
            assert [built._tokens_after(step) for step in (0, 1, 3)] == [0, 128, 512]
            # The clock restarts after a stage is built, so that this time is not its first step's.
            assert restarts == [2]
        built.close()
    assert [line["tokens"] for line in metrics(output.directory)] == [128, 256, 512, 768]


def test_the_note_of_a_finished_run_is_its_configuration(job):
    finished = json.loads((job / "run" / "finished.json").read_text())
    assert finished["optimizer"]["steps"] == STEPS
    assert finished["checkpoint"]["export_every"] == 2


def test_settings_of_the_data_reach_the_run(job, tmp_path):
    """Text from another key, one document per block, and skipped positions."""
    documents = [" ".join(f"word{n}" for n in range(k, k + 30)) for k in range(40)]
    lines = [json.dumps({"content": text, "text": "not this"}) for text in documents]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    options = ("data.text_key=content", "data.packing=false", "data.positions=skip-uniform")
    paths = f"data.paths={tmp_path / 'text.jsonl'}"
    output = tmp_path / "output"
    train(arguments(job, output, paths, *options, "optimizer.steps=1"))
    meta = json.loads((output / "tokens" / "meta.json").read_text())
    assert meta["documents"] == 40
    assert meta["tokens"] == sum(map(len, documents))
    baseline = tmp_path / "contiguous"
    train(arguments(job, baseline, paths, *options[:2], "optimizer.steps=1"))
    assert metrics(output)[0]["loss"] != metrics(baseline)[0]["loss"]


def test_dropout_and_native_context_reach_the_run(job, tmp_path):
    def first_losses(name: str, *options: str) -> list[float]:
        # Above the first step B is not zero, so that dropout has an effect.
        train(arguments(job, tmp_path / name, "optimizer.steps=3", *options))
        return [line["loss"] for line in metrics(tmp_path / name)]

    with_dropout = first_losses("with")
    without = first_losses("without", "trainable.lora={rank: 4, alpha: 8, dropout: 0}")
    assert with_dropout[0] == without[0] and with_dropout[2] != without[2]
    yarn = first_losses("yarn", "rope.type=yarn")
    shorter = first_losses("shorter", "rope.type=yarn", "model.native_context=32")
    assert yarn[0] != shorter[0]
    config = json.loads((tmp_path / "shorter" / "student" / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert config["rope_scaling"]["original_max_position_embeddings"] == 32


def test_max_tokens_of_an_evaluation_reach_the_measurement(job, tmp_path):
    held_out = f"evaluation.paths={job / 'heldout.txt'}"
    options = (held_out, "evaluation.lengths=[32]", "optimizer.steps=1")
    losses = []
    for count in (64, 1000):
        output = tmp_path / str(count)
        train(arguments(job, output, *options, f"evaluation.max_tokens={count}"))
        report = json.loads((output / "evaluation.json").read_text())
        assert report["settings"]["max_tokens"] == count
        losses.append(report["models"][0]["by_length"]["32"]["loss"])
    assert losses[0] != losses[1]


def test_the_export_is_evaluated_as_the_run_evaluated_it(job, tmp_path):
    """``megalard evaluate`` of the export gives the losses that the run reported."""
    held_out = job / "heldout.txt"
    options = (f"evaluation.paths={held_out}", "evaluation.lengths=[32, 128]", "optimizer.steps=2")
    train(arguments(job, tmp_path / "run", *options))
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    result = tmp_path / "evaluated"
    words = [tmp_path / "run" / "student", "--text", held_out, "--lengths", 32, 128]
    assert megalard("evaluate", *words, "--output", result, "--dtype", "float32") == 0
    evaluated = json.loads(result.with_suffix(".json").read_text())
    for length in ("32", "128"):
        ours = evaluated["models"][0]["by_length"][length]["loss"]
        # The export merges LoRA, so that the order of summation differs.
        assert ours == pytest.approx(report["models"][2]["by_length"][length]["loss"], abs=1e-4)
