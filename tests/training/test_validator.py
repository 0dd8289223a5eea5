"""Validation during a run: what is measured and when, the best student, and the early end."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megalard.data.tokenizer import load_tokenizer
from megalard.training.evaluator import Evaluator
from megalard.training.validator import Validation, Validator
from tests.command_line import user_error
from tests.jobs import NATIVE, STEPS, arguments, interrupted, metrics, train
from tests.ranks import run_ranks

EVERY = ("evaluation.every=2", "evaluation.validation_tokens=256", "run.log_every=3")
KEEP = "checkpoint.keep_best=true"
LENGTHS = "evaluation.lengths=[64, 128]"


@pytest.fixture(scope="module")
def text(small_job) -> str:
    return f"evaluation.paths={small_job / 'heldout.txt'}"


@pytest.fixture(scope="module")
def output(small_job, text, tmp_path_factory):
    """A run with validations and exports of the same steps."""
    output = tmp_path_factory.mktemp("validated") / "run"
    saving = ("checkpoint.save_every=2", "checkpoint.keep_last=9", "checkpoint.export_every=4")
    train(arguments(small_job, output, text, LENGTHS, *EVERY, *saving))
    return output


def validations(output) -> list[dict]:
    return [line for line in metrics(output) if "validation_kl" in line]


def test_the_student_is_validated_at_the_interval_and_after_the_last_step(output):
    assert [line["step"] for line in validations(output)] == [2, 4, 6, 8]
    steps = [line["step"] for line in metrics(output) if "loss" in line]
    assert steps == [3, 6, 8]


def test_the_numbers_are_those_of_transformers(output, small_job):
    """Of the exported student of step 4, in float64, on the first 256 tokens of the text."""
    line = next(line for line in validations(output) if line["step"] == 4)
    text = (small_job / "heldout.txt").read_text()
    tokens = torch.tensor(load_tokenizer(small_job / "model").encode_batch([text])[0])

    def logits(folder, length: int) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        with torch.no_grad():
            return model(tokens[:256].view(-1, length)).logits[:, :-1].log_softmax(-1)

    divergences, agreements = [], []
    for length in (64, 128):
        student = logits(output / "step-000004", length)
        targets = tokens[:256].view(-1, length)[:, 1:]
        loss = -student.gather(-1, targets[..., None]).mean()
        assert line[f"validation_loss_{length}"] == pytest.approx(float(loss), abs=1e-4)
        if length <= NATIVE:
            teacher = logits(small_job / "model", length)
            divergences.append((teacher.exp() * (teacher - student)).sum(-1).mean())
            agreements.append((teacher.argmax(-1) == student.argmax(-1)).double().mean())
    assert line["validation_kl"] == pytest.approx(float(sum(divergences)), abs=1e-4)
    assert line["validation_agreement"] == pytest.approx(float(sum(agreements)), abs=1e-6)


def test_the_gap_is_that_of_the_same_windows(output, text, small_job, tmp_path):
    """An evaluation of exactly these tokens, at its end, gives the share of the last validation."""
    options = ("evaluation.max_tokens=256", LENGTHS, text)
    train(arguments(small_job, tmp_path / "run", *options))
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    share = validations(output)[-1]["validation_gap_restored"]
    assert share == pytest.approx(report["models"][-1]["gap_restored"], abs=1e-6)


def test_validations_do_not_change_the_run(output, small_job, tmp_path):
    train(arguments(small_job, tmp_path / "run"))
    trained = load_file(tmp_path / "run" / "student" / "model.safetensors")
    for name, value in load_file(output / "student" / "model.safetensors").items():
        assert torch.equal(trained[name], value), name


def test_tensorboard_and_the_progress_line_have_the_validation(output, small_job, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(output / "tensorboard"))
    shown.Reload()
    assert [e.step for e in shown.Scalars("validation_gap_restored")] == [2, 4, 6, 8]
    resumed = interrupted(output, tmp_path / "resumed")
    text = f"evaluation.paths={small_job / 'heldout.txt'}"
    train(arguments(small_job, resumed, text, LENGTHS, *EVERY))
    printed = capsys.readouterr().out.splitlines()
    share = validations(output)[2]["validation_gap_restored"]
    assert any(f"step 6/8  validation: gap restored {share:.3f}  KL" in line for line in printed)
    last = next(line for line in printed if line.startswith("step 8/8  loss"))
    assert f"gap restored {share:.3f}" in last


def test_a_resumed_run_repeats_no_validation_and_loses_none(output, small_job, text, tmp_path):
    resumed = interrupted(output, tmp_path / "resumed")
    train(arguments(small_job, resumed, text, LENGTHS, *EVERY, "checkpoint.save_every=2"))
    assert validations(resumed) == validations(output)
    newest = json.loads((resumed / "checkpoints/step-000008/manifest.json").read_text())
    results = newest["training"]["validations"]["results"]
    assert [result["step"] for result in results] == [2, 4, 6, 8]


def _train(words: list[str]) -> None:
    train(words)


@pytest.mark.parametrize("axis", ["tp", "cp", "dp"])
def test_every_layout_measures_the_same(axis, output, small_job, text, tmp_path):
    # Micro-batches are as large as they can be, which takes half of the time.
    layout = () if axis == "dp" else (f"parallel.{axis}=2", "optimizer.micro_batch=4")
    run_ranks(2, _train, arguments(small_job, tmp_path / "run", text, LENGTHS, *EVERY, *layout))
    for ours, expected in zip(validations(tmp_path / "run"), validations(output), strict=True):
        for name, value in expected.items():
            # fp32 sums in another order, through eight steps.
            assert ours[name] == pytest.approx(value, abs=2e-4), (axis, name)


def test_later_stages_are_compared_after_the_teacher_is_freed(small_job, text, tmp_path):
    """The second stage reads no teacher; its first step leaves about the KL of the step before."""
    later = "{objective: {language_modelling: 1}, optimizer: {learning_rate: 0.00001}}"
    options = (
        f"stages={{a: {{}}, b: {later}}}",
        "optimizer.steps=2",
        text,
        LENGTHS,
        "evaluation.every=1",
    )
    train(arguments(small_job, tmp_path / "run", *options))
    lines = validations(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["stage"] for line in lines] == ["a", "a", "b", "b"]
    assert lines[2]["validation_kl"] == pytest.approx(lines[1]["validation_kl"], rel=1e-2)


# Steps that are too long, so that the student gets worse. Where it is the best depends on
# rounding, so a run with the last rates is made only where the ones before found it too late.
TOO_LONG = ("optimizer.learning_rate=10", "optimizer.learning_rate=3", "optimizer.learning_rate=1")
WORSE = (TOO_LONG[0], "optimizer.clip=0")


def test_the_run_ends_when_validations_stop_to_improve(small_job, text, tmp_path, capsys):
    for number, rate in enumerate(TOO_LONG):
        output, worse = tmp_path / f"run-{number}", (rate, "optimizer.clip=0")
        options = (text, LENGTHS, "evaluation.every=1", "evaluation.patience=3", *worse)
        capsys.readouterr()
        train(arguments(small_job, output, *options))
        lines = validations(output)
        shares = [line["validation_gap_restored"] for line in lines]
        best = shares.index(max(shares))
        if len(lines) < STEPS:
            break
    assert len(lines) == best + 1 + 3 < STEPS
    assert (output / "finished.json").is_file()
    printed = capsys.readouterr().out
    reason = f"ends after step {len(lines)} of 8: 3 validations in a row were not better than step"
    assert f"{reason} {best + 1} (evaluation.patience)" in printed
    assert f"the student of step {best + 1} is exported, whose validation is the best" in printed
    report = json.loads((output / "evaluation.json").read_text())
    restored = report["models"][-1]
    assert restored["tokens"] == (best + 1) * 128
    # The evaluation after the run measures the student of the best step, on more tokens.
    again = tmp_path / "again"
    train(arguments(small_job, again, *options[:2], *worse, "checkpoint.export_every=1"))
    expected = load_file(again / f"step-{best + 1:06d}" / "model.safetensors")
    for name, value in load_file(output / "student" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_a_run_that_ended_early_takes_no_step_when_it_is_resumed(small_job, text, tmp_path, capsys):
    options = (text, LENGTHS, "evaluation.every=1", "evaluation.patience=2", *WORSE)
    output = tmp_path / "run"
    train(arguments(small_job, output, *options))
    student, lines = load_file(output / "student" / "model.safetensors"), metrics(output)
    shutil.rmtree(output / "student")
    (output / "finished.json").unlink()
    train(arguments(small_job, output, *options))
    assert metrics(output) == lines
    for name, value in load_file(output / "student" / "model.safetensors").items():
        assert torch.equal(value, student[name]), name


def test_the_best_checkpoint_is_never_removed(small_job, text, tmp_path):
    for number, rate in enumerate(TOO_LONG):
        output = tmp_path / f"run-{number}"
        options = (text, LENGTHS, "evaluation.every=1", KEEP, rate, "optimizer.clip=0")
        saving = ("checkpoint.save_every=1", "checkpoint.keep_last=1")
        train(arguments(small_job, output, *options, *saving))
        shares = [line["validation_gap_restored"] for line in validations(output)]
        best = shares.index(max(shares)) + 1
        if best < STEPS:
            break
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert best < STEPS and kept == [f"step-{best:06d}", "step-000008"]


@pytest.fixture
def make(planned, small_job, text, tmp_path):
    """A function that makes the validator of a run whose last stage begins at step 3."""

    def make(*options: str, has_text: bool = True, first_step: int = 3) -> Validator:
        run = planned(*((text,) if has_text else ()), "evaluation.every=1", *options)
        evaluator = Evaluator(run.config, run.plan, tmp_path, run.mesh)
        return Validator(run.config, evaluator, first_step)

    return make


def results(*losses: float, long: float = 9.0) -> list[Validation]:
    return [
        Validation(step, {32: loss, 128: long - loss}, None, None, None)
        for step, loss in enumerate(losses, 1)
    ]


def test_the_best_one_is_of_the_last_stage_and_the_first_of_equals(make):
    validator = make()
    validator.results = results(1.0, 1.0, 4.0, math.nan, 3.0, 3.0, 5.0)
    assert validator.best.step == 5
    validator.results = results(1.0, 1.0, math.nan)
    assert validator.best is None


def test_the_last_step_is_validated_though_it_is_not_at_the_interval(make):
    validator = make("evaluation.every=3")
    assert [step for step in range(1, STEPS + 1) if validator.is_due(step)] == [3, 6, STEPS]
    assert not any(make("evaluation.every=0").is_due(step) for step in range(1, STEPS + 1))


def test_the_loss_over_all_lengths_can_be_what_counts(make):
    validator = make("evaluation.best=loss", KEEP, first_step=1)
    validator.results = [Validation(1, {32: 1.0, 128: 9.0}, 0.9, 0, 0)]
    validator.results += [Validation(2, {32: 2.0, 128: 2.0}, 0.1, 0, 0)]
    assert validator.best.step == 2 and validator.describe(validator.best) == "loss 2.0000"
    other = make(first_step=1)
    other.results = validator.results
    assert other.best.step == 1 and other.describe(other.best) == "gap restored 0.900"


@pytest.mark.parametrize(
    "losses, stops",
    [((9, 9, 4.0, 5.0), False), ((9, 9, 4.0, 5.0, 4.0), True), ((9, 9, 4.0, 5.0, 3.0), False)],
)
def test_patience_counts_validations_after_the_best(losses, stops, make):
    validator = make("evaluation.patience=2")
    validator.results = results(*losses)
    assert validator.has_stopped_improving() is stops
    without = make()
    without.results = results(*losses)
    assert not without.has_stopped_improving()


def test_validations_on_other_text_are_not_compared(make):
    before = make(LENGTHS, first_step=1)
    before.results = results(1.0, math.nan)
    state = json.loads(json.dumps(before.state(), allow_nan=False))
    same, other = make(LENGTHS, first_step=1), make("evaluation.lengths=[32]", first_step=1)
    assert same.resume(state) and same.best.step == 1 and math.isnan(same.results[1].loss[32])
    assert not other.resume(state) and other.best is None and len(other.results) == 2
    other.results += [Validation(3, {32: 5.0}, None, None, None)]
    again = make("evaluation.lengths=[32]", first_step=1)
    assert again.resume(other.state()) and again.best.step == 3


def test_validations_that_cannot_be_made_are_refused(make):
    assert "there is no held-out text to measure on" in user_error(make, has_text=False)
    sentence = user_error(make, "evaluation.lengths=[128]", KEEP)
    assert "evaluation.best gap_restored needs a length up to the native window of 64" in sentence
    assert make("evaluation.lengths=[128]", "evaluation.best=loss", KEEP).is_due(1)
    assert make("evaluation.lengths=[128]").is_due(1)


@pytest.mark.parametrize(
    "option, sentence",
    [
        (
            "evaluation.patience=2",
            "evaluation.patience 2 compares validations, and evaluation.every",
        ),
        (KEEP, "checkpoint.keep_best true compares validations, and evaluation.every is 0"),
        ("evaluation.best=loss", "evaluation.best loss chooses the student to keep, and none is"),
    ],
)
def test_settings_without_effect_are_refused(option, sentence, planned):
    assert sentence in user_error(planned, option)
