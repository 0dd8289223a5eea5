"""The quickstart's teacher can be made again: on a little text, for two steps."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest

from megalard.checkpoint.open import open_model
from tests.command_line import one_error, tool
from tools.quickstart import stdlib_text, teacher

pretrain_teacher = tool("quickstart.pretrain_teacher")
KEPT = Path(__file__).parents[3] / "launch" / "quickstart_teacher"


@pytest.fixture
def little_text(monkeypatch):
    text = Path(statistics.__file__).read_text(encoding="utf-8")
    splits = {
        name: [{"text": text[start : start + 12_000], "source": name}]
        for name, start in (("train", 0), ("validation", 12_000), ("heldout", 24_000))
    }
    monkeypatch.setattr(stdlib_text, "collect_splits", lambda: splits)


def test_a_teacher_of_the_same_kind_is_made(little_text, tmp_path, capsys):
    options = ("--steps", 2, "--global-batch", 2, "--warmup-steps", 1, "--no-compile")
    assert pretrain_teacher("--output", tmp_path / "teacher", *options, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "step     2/2" in printed and "positions / 8" in printed
    made, kept = open_model(tmp_path / "teacher"), open_model(KEPT)
    assert set(made.weights.names()) == set(kept.weights.names())
    for name in kept.weights.names():
        assert made.weights.shape(name) == kept.weights.shape(name)
        assert made.weights.dtype(name) == kept.weights.dtype(name)
    configs = [json.loads((m.directory / "config.json").read_text()) for m in (made, kept)]
    for config in configs:
        del config["transformers_version"]
    assert configs[0] == configs[1]
    assert made.tokenizer.vocab_size == kept.tokenizer.vocab_size == 512


def test_the_learning_rate_warms_up_and_falls_to_a_fiftieth():
    rates = [teacher.learning_rate(step, 100, 1.0, 10) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0
    assert rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.02)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_a_teacher_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert pretrain_teacher("--output", tmp_path, "--device", "cpu") == 1
    assert "is not empty" in one_error(capsys.readouterr().err)
