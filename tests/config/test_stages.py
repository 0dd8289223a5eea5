"""Stages in a configuration: what each takes from the sections of the run."""

from __future__ import annotations

import pytest

from tests.config.loading import load, refusal

TWO = (
    "{first: {trainable: {mode: all}, optimizer: {steps: 3}}, second: {objective: {logits_kl: 1}}}"
)


def test_without_stages_there_is_one():
    config = load("--optimizer.steps=7", "--optimizer.global_batch=2", "--data.context_length=10")
    assert config.all_stages() == {"main": config}
    assert (config.steps, config.tokens) == (7, 7 * 20)


def test_a_stage_takes_what_it_leaves_out_from_the_sections():
    config = load(
        f"--stages={TWO}",
        "--optimizer.steps=5",
        "--optimizer.learning_rate=0.5",
        "--optimizer.global_batch=2",
        "--data.context_length=10",
        "--trainable.lora.rank=3",
        "--objective.hidden_cosine=1",
    )
    first, second = config.all_stages().values()
    assert (first.trainable.mode, second.trainable.mode) == ("all", "lora")
    assert first.trainable.lora.rank == second.trainable.lora.rank == 3
    assert (first.optimizer.steps, second.optimizer.steps) == (3, 5)
    assert first.optimizer.learning_rate == second.optimizer.learning_rate == 0.5
    assert first.data.paths == second.data.paths == ["a", "b"]
    # A stage without an objective has the run's; another has only the terms that it names.
    assert first.objective.active_terms() == ["relations", "hidden_cosine"]
    assert second.objective.active_terms() == ["logits_kl"]
    assert first.stages == second.stages == {}
    assert (config.steps, config.tokens) == (8, 8 * 20)


def test_a_stage_may_have_streams_of_its_own_or_the_run_s():
    streams = "{a: {objective: {logits_kl: 1}}, b: {objective: {language_modelling: 1}}}"
    config = load(f"--streams={streams}", "--stages={x: {}, y: {objective: {hidden_cosine: 1}}}")
    x, y = config.all_stages().values()
    assert [*x.all_streams()] == ["a", "b"]
    assert [*y.all_streams()] == ["main"] and y.objective.active_terms() == ["hidden_cosine"]
    config = load(f"--stages={{x: {{streams: {streams}, data: {{context_length: 6}}}}}}")
    (x,) = config.all_stages().values()
    assert [stream.data.context_length for stream in x.all_streams().values()] == [6, 6]


def test_only_the_first_stage_has_the_seed_of_a_run_with_one():
    """The others read their text in another order."""
    config = load("--stages={a: {}, b: {}, c: {}}", "--run.seed=4")
    seeds = [stage.run.seed for stage in config.all_stages().values()]
    # The CRC-32 of the names: a resumed run and all ranks must draw the same.
    assert seeds == [4, 4 + 1908338681, 4 + 112844655]
    turned = load("--stages={a: {}, c: {}, b: {}}", "--run.seed=4").all_stages()
    assert turned["b"].run.seed == seeds[1]


def test_null_removes_a_stage(write):
    path = write(f"stages: {TWO}\n")
    assert [*load("--stages.first=null", path=path).all_stages()] == ["second"]
    assert [*load("--stages=null", path=path).all_stages()] == ["main"]


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ("3", "'stages' is a section of named entries, got the value 3"),
        ("{a: 3}", "'stages.a' is a section, got the value 3"),
        ("{a: {optimizer: {steps: 0}}}", "stages.a.optimizer.steps must be at least 1; got 0"),
        ("{a: {streams: {b: {objective: {}}}}}", "stages.a.streams.b.objective is empty"),
        ("{a: {trainable: {mode: some}}}", "stages.a.trainable.mode must be one of lora, weights"),
        ("{a: {steps: 3}}", "unknown key 'stages.a.steps'; the nearest known one is"),
        ("{a: {objective: [q]}}", "'stages.a.objective' is a section, got the value ['q']"),
        ("{'a.b': {}}", "stages has the entry 'a.b': a name may have letters"),
    ],
)
def test_bad_stages_are_refused_in_one_sentence(stages, sentence):
    assert sentence in refusal(f"--stages={stages}")


def test_a_setting_that_no_stage_takes_is_refused():
    stages = "{a: {optimizer: {steps: 3}}, b: {optimizer: {steps: 4}}}"
    assert "set stages.NAME.optimizer.steps instead" in refusal(
        f"--stages={stages}", "--optimizer.steps=9"
    )
    assert load(f"--stages={stages}", "--optimizer.warmup_steps=1").steps == 7


def test_an_unknown_key_of_a_section_is_named_as_it_was_written():
    """The stages take the section, and would be named otherwise."""
    sentence = refusal(f"--stages={TWO}", "--optimizer.lerning_rate=1")
    assert sentence.startswith("unknown key 'optimizer.lerning_rate'; the nearest known one is")
