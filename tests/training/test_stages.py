"""Stages: which steps belong to each, and a run of several from the command line."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from megalard.checkpoint.sharded.manifest import read_manifest
from megalard.evaluation.report import read_json
from megalard.training.run_folder import checkpoint_path
from megalard.training.stages import (
    data_key,
    first_with_same_parameters,
    needs_teacher,
    stage_after,
    stages_of,
    weights_changed_before,
)
from tests.command_line import megalard, refusal
from tests.config.loading import load
from tests.jobs import arguments, interrupted, losses, make_job, metrics, train
from tests.logits import assert_same_logits, decoder_logits, random_tokens, transformers_logits
from tests.logits import load as load_decoder

# Three steps of LoRA, two more with the optimizer kept, and three of all weights without a teacher.
STAGES = (
    "{first: {optimizer: {steps: 3}, export: true}, "
    "second: {optimizer: {steps: 2}, keep_optimizer: true}, "
    "last: {trainable: {mode: all}, objective: {language_modelling: 1}}}"
)
STAGED = (f"stages={STAGES}", "optimizer.steps=3")
SAVE = ("checkpoint.save_every=1", "checkpoint.keep_last=99")


def stages(text: str = STAGES) -> list:
    """Return the stages of a configuration."""
    return stages_of(load(f"--stages={text}", "--optimizer.steps=3"))


def test_steps_are_counted_over_all_stages():
    first, second, last = stages()
    assert [(stage.steps_before, stage.last_step) for stage in (first, second, last)] == [
        (0, 3),
        (3, 5),
        (5, 8),
    ]
    assert [*second.steps_after(0)] == [*second.steps_after(3)] == [4, 5]
    assert [*second.steps_after(4)] == [5] and [*second.steps_after(5)] == []
    assert [stage.exports for stage in (first, second, last)] == [True, False, False]
    assert [stage.keeps_optimizer for stage in (first, second, last)] == [False, True, False]


def test_at_a_boundary_the_state_is_the_earlier_stage_s():
    assert [stage_after(stages(), step) for step in range(9)] == [0, 0, 0, 0, 1, 1, 2, 2, 2]


def test_a_stage_that_keeps_the_optimizer_keeps_the_parameters():
    assert [first_with_same_parameters(stages(), number) for number in range(3)] == [0, 0, 2]


def test_a_run_without_stages_is_one_stage():
    (main,) = stages_of(load("--optimizer.steps=7"))
    assert (main.name, main.steps_before, main.last_step) == ("main", 0, 7)
    assert data_key(main, "long") == "long"
    assert data_key(stages()[1], "long") == "second/long"


def test_the_teacher_is_needed_while_a_stage_that_remains_compares_with_it():
    all_stages = stages()
    assert [needs_teacher(all_stages[number:]) for number in range(3)] == [True, True, False]


def test_weights_that_earlier_stages_changed_are_named():
    """With Q/K alone in the loss, the last layer's v_proj is not reached and stays as it was."""
    text = (
        "{a: {trainable: {mode: weights, weights: [q, v]}, objective: {relations: {qk: 1}}}, "
        "b: {trainable: {lora: {targets: [k]}}}, c: {}}"
    )
    projections = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1) for p in "qkvo"]
    changed = [weights_changed_before(stages(text), number, projections, 2) for number in range(3)]
    first = {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    }
    k = {"model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight"}
    assert changed == [set(), first, first | k]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job, with a complete run of three stages and with the same stages as runs of their own."""
    folder = make_job(tmp_path_factory.mktemp("stages"))
    train(arguments(folder, folder / "run", *STAGED, *SAVE))
    return folder


def test_the_first_stage_is_a_run_of_its_own(job, tmp_path):
    """The first stage against a run of its own: the same losses and the same student."""
    lines = metrics(job / "run")
    assert [line["stage"] for line in lines] == ["first"] * 3 + ["second"] * 2 + ["last"] * 3
    assert [line["step"] for line in lines] == list(range(1, 9))
    alone = tmp_path / "alone"
    train(arguments(job, alone, "optimizer.steps=3", *SAVE))
    assert [line["loss"] for line in metrics(alone)] == [line["loss"] for line in lines[:3]]
    exported = load_file(alone / "student" / "model.safetensors")
    staged = load_file(job / "run" / "stage-first" / "model.safetensors")
    assert exported.keys() == staged.keys()
    assert all(torch.equal(staged[name], value) for name, value in exported.items())
    assert not (job / "run" / "stage-second").exists()


def test_each_stage_has_a_schedule_of_its_own(job):
    """Two steps of warm-up to 0.01, and the end of the cosine at 0.9 of it."""
    rates = [line["learning_rate"] for line in metrics(job / "run")]
    assert rates[:2] == rates[5:7] == [0.005, 0.01]
    assert rates[2] == rates[7] == pytest.approx(0.009)
    assert rates[3:5] == [0.005, 0.01]


def test_a_stage_trains_what_it_names(job):
    """LoRA leaves all but q, k and v as they were; the last stage changes every weight."""
    before = load_file(job / "model" / "model.safetensors")
    first = load_file(job / "run" / "stage-first" / "model.safetensors")
    last = load_file(job / "run" / "student" / "model.safetensors")
    changed = {name for name, value in before.items() if not torch.equal(first[name], value)}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj"}
    assert all(not torch.equal(last[name], value) for name, value in before.items())


def test_the_student_of_the_last_stage_is_what_transformers_reads(job):
    tokens = random_tokens(1, 40, 257)
    student = job / "run" / "student"
    ours = decoder_logits(load_decoder(student), tokens)
    assert_same_logits(ours, transformers_logits(student, tokens))


@pytest.mark.parametrize("step", [2, 3, 4, 5, 6])
def test_a_run_is_resumed_in_any_stage_and_at_their_boundaries(step, job, tmp_path):
    """Bit for bit: also where merged weights and the optimizer of a stage before go on."""
    output = interrupted(job / "run", tmp_path / "output", step=step)
    shutil.rmtree(output / "stage-first")
    if step < 4:
        # Of lines of later steps, which are taken again.
        assert len((output / "metrics.jsonl").read_text().splitlines()) > step
    else:
        shutil.copy(job / "run" / "metrics.jsonl", output / "metrics.jsonl")
    train(arguments(job, output, *STAGED, *SAVE))
    assert losses(output) == losses(job / "run")
    complete = load_file(job / "run" / "student" / "model.safetensors")
    resumed = load_file(output / "student" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in complete.items())
    # The export of a stage that had ended is not made again.
    assert (output / "stage-first").exists() == (step <= 3)


def test_checkpoints_name_the_stage_and_where_every_stage_is(job):
    folder = job / "run" / "checkpoints"
    for step, stage, read in ((3, "first", [12, 0, 0]), (4, "second", [12, 4, 0])):
        training = read_manifest(checkpoint_path(folder, step)).training
        assert (training["step"], training["stage"]) == (step, stage)
        blocks = {name: entry["blocks_read"] for name, entry in training["data"].items()}
        assert blocks == dict(zip(("first/main", "second/main", "last/main"), read, strict=True))
    # A stage after LoRA carries the merged weights, and is a checkpoint of weights.
    trained = read_manifest(checkpoint_path(folder, 6)).trained
    assert trained["mode"] == "all" and trained["lora"] is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("second: {", "other: {"), "other stages (first, second, last, not first, other, last)"),
        (("steps: 2", "steps: 4"), "a run with stages.second.optimizer.steps 2, not 4"),
        (("mode: all", "mode: weights"), "stages.last.trainable.mode 'all', not 'weights'"),
    ],
)
def test_other_stages_are_refused(change, sentence, job, tmp_path, capsys):
    output = interrupted(job / "run", tmp_path / "output")
    command = arguments(job, output, STAGED[0].replace(*change), STAGED[1], *SAVE)
    assert sentence in refusal(capsys, "train", *command)


def test_preflight_takes_two_steps_of_each_stage(job, tmp_path, capsys):
    command = arguments(job, tmp_path / "output", *STAGED)
    assert megalard("preflight", *command) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("stage ")] == [
        "stage first",
        "stage second",
        "stage last",
    ]
    assert printed.count("gradients: finite and not zero") == 3
    assert "all stages: " in printed and not (tmp_path / "output").exists()


def test_what_was_measured_between_stages_is_kept_by_a_resumed_run(job, tmp_path):
    """A run that is resumed in its last stage reports the students of the stages before."""
    measured = f"evaluation.paths={job / 'heldout.txt'}", "evaluation.lengths=[16]"
    complete = tmp_path / "complete"
    train(arguments(job, complete, *STAGED, *SAVE, *measured))
    output = interrupted(complete, tmp_path / "output", step=6)
    shutil.copy(complete / "evaluation.json", output / "evaluation.json")
    train(arguments(job, output, *STAGED, *SAVE, *measured))
    names = [entry.name for entry in read_json(output / "evaluation.json")[0]]
    assert names == ["teacher", "scaled", "after first", "after second", "restored"]
    content = [(folder / "evaluation.json").read_text() for folder in (complete, output)]
    assert content[0] == content[1]
    # The rows of a run that measures other lengths now would not fit into its table.
    again = interrupted(complete, tmp_path / "again", step=6)
    shutil.copy(complete / "evaluation.json", again / "evaluation.json")
    train(arguments(job, again, *STAGED, *SAVE, measured[0], "evaluation.lengths=[32]"))
    names = [entry.name for entry in read_json(again / "evaluation.json")[0]]
    assert names == ["teacher", "scaled", "restored"]


def test_an_export_of_the_last_stage_is_refused(job, tmp_path, capsys):
    changed = STAGED[0].replace("mode: all}", "mode: all}, export: true")
    sentence = refusal(capsys, "train", *arguments(job, tmp_path / "output", changed, STAGED[1]))
    assert "stages.last.export is true, but the student that the last stage leaves" in sentence
