"""Evaluation around a run: what is measured, of which text, and where the results go."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.data.boundaries import Boundaries
from megalard.errors import UserError
from megalard.training.evaluator import Evaluator
from megalard.training.holdout import HeldOut
from tests.jobs import NATIVE, STEPS, arguments, train


@pytest.fixture
def make(planned, small_job, tmp_path):
    """A function that makes the evaluator of a run on held-out text."""

    def make(*options: str, held_out: HeldOut | None = None):
        run = planned(*options)
        folder = tmp_path / "evaluator"
        folder.mkdir(exist_ok=True)
        return run, Evaluator(run.config, run.plan, folder, run.mesh, held_out)

    return make


@pytest.fixture
def text(small_job) -> str:
    """The setting that names held-out text."""
    return f"evaluation.paths={small_job / 'heldout.txt'}"


def test_without_text_nothing_is_measured(make, capsys):
    _, evaluator = make()
    assert not evaluator.is_active
    evaluator.before(None, None)
    evaluator.between("later", None, None, 3)
    evaluator.after(None, None, 5)
    assert evaluator.entries == [] and capsys.readouterr().out == ""
    assert list(evaluator.output.iterdir()) == []


def test_lengths_are_multiples_and_parts_of_the_native_window(make, text):
    _, evaluator = make(text)
    # M/4, M/2, M, 2M and f*M for M = 64 and f = 4.
    assert sorted(evaluator.suite.windows) == [16, 32, 64, 128, 256]


def test_lengths_and_tokens_can_be_configured(make, text):
    _, evaluator = make(text, "evaluation.lengths=[10, 20]", "evaluation.max_tokens=90")
    windows = evaluator.suite.windows
    # 90 tokens are four windows of 20.
    assert {length: part.shape for length, part in windows.items()} == {10: (8, 10), 20: (4, 20)}
    assert np.array_equal(windows[10].reshape(-1), windows[20].reshape(-1))
    assert evaluator.settings["max_tokens"] == 90


def test_a_length_above_max_tokens_has_one_window(make, text):
    _, evaluator = make(text, "evaluation.lengths=[100]", "evaluation.max_tokens=50")
    assert evaluator.suite.windows[100].shape == (1, 100)


def test_a_text_that_is_too_short_is_refused(make, text):
    with pytest.raises(UserError, match="has 1415 tokens but the longest length is 2000"):
        make(text, "evaluation.lengths=[2000]")


def held_out_tokens(count: int, before: tuple[int, ...] = ()) -> HeldOut:
    """Return a part of a training text whose documents begin with some ids."""
    return HeldOut(np.arange(count, dtype=np.int64) % 60, Boundaries(before))


def test_a_part_of_the_training_text_is_measured_at_the_lengths_that_it_has(make):
    _, evaluator = make(held_out=held_out_tokens(100))
    assert sorted(evaluator.suite.windows) == [16, 32, 64]
    assert evaluator.settings == {"training_tokens_held_out": 100}
    _, evaluator = make("evaluation.lengths=[200]", held_out=held_out_tokens(100))
    assert not evaluator.is_active


def test_windows_begin_as_the_documents_begin(make):
    _, evaluator = make("evaluation.lengths=[10]", held_out=held_out_tokens(100, (77,)))
    windows = evaluator.suite.windows[10]
    assert set(windows[:, 0]) == {77} and windows[0, 1:].tolist() == list(range(9))
    assert windows[1, 1:].tolist() == list(range(9, 18))


def run_with_evaluation(small_job, text: str, folder):
    """Train with held-out text; return the report and the output directory."""
    train(arguments(small_job, folder, text, "evaluation.lengths=[32, 64, 128]"))
    return json.loads((folder / "evaluation.json").read_text())


def test_a_run_is_evaluated_before_and_after(small_job, text, tmp_path, capsys):
    report = run_with_evaluation(small_job, text, tmp_path / "run")
    assert [model["name"] for model in report["models"]] == ["teacher", "scaled", "restored"]
    assert (report["native_context"], report["factor"]) == (NATIVE, 4.0)
    assert report["settings"]["text"] == [str(small_job / "heldout.txt")]
    assert [model["tokens"] for model in report["models"]] == [0, 0, STEPS * 4 * 32]
    assert (tmp_path / "run" / "evaluation.png").exists()
    printed = capsys.readouterr().out
    assert "Perplexity by context length (native window M = 64)" in printed
    assert "of the short-text gap on held-out text, with 1,024 tokens" in printed


def test_the_losses_are_those_of_transformers(small_job, text, tmp_path):
    """Of the teacher and of the exported student, in float64, on the same windows."""
    run_folder = tmp_path / "run"
    report = run_with_evaluation(small_job, text, run_folder)
    tokens = np.frombuffer((small_job / "heldout.txt").read_bytes(), np.uint8)
    alphabet = json.loads((small_job / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [alphabet[chr(byte) if byte != 32 else "\u0120"] for byte in tokens]
    # As many windows of 128 as there are, which the other lengths cut up.
    count = len(tokens) // 128 * 128
    for entry, folder in ((0, small_job / "model"), (2, run_folder / "student")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for length in (32, 64, 128):
            windows = torch.tensor(tokens[:count]).view(-1, length)
            with torch.no_grad():
                logits = model(windows, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            measured = report["models"][entry]["by_length"][str(length)]
            # fp32 rounding through three layers, of losses of about 5.
            assert measured["loss"] == pytest.approx(float(loss), abs=1e-4), (folder, length)


def test_the_student_is_measured_between_stages(small_job, text, tmp_path):
    stages = "stages={a: {}, b: {}, c: {objective: {language_modelling: 1}}}"
    options = (stages, "optimizer.steps=1", text, "evaluation.lengths=[32]")
    train(arguments(small_job, tmp_path / "run", *options))
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    models = {model["name"]: model for model in report["models"]}
    assert [*models] == ["teacher", "scaled", "after a", "after b", "restored"]
    assert [models[name]["tokens"] for name in models] == [0, 0, 128, 256, 384]


def test_a_run_without_text_measures_the_end_of_its_own(small_job, tmp_path, capsys):
    train(arguments(small_job, tmp_path / "run", "evaluation.holdout=32768"))
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    count = report["settings"]["training_tokens_held_out"]
    assert f"held out  {count:,} tokens of the training text" in capsys.readouterr().out
    assert [*report["models"][0]["by_length"]] == ["16", "32", "64", "128"]
