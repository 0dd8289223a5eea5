"""The table of ways of rounding: every row, and what each way keeps."""

from __future__ import annotations

import torch

from tests.command_line import tool
from tests.jobs import arguments, make_job, train
from tools.bench.export_rounding import nearest, stochastic, with_feedback

compare = tool("bench.export_rounding")


def test_error_feedback_keeps_the_sums_of_rows():
    exact = torch.randn(20, 500)
    step = 2.0**-7
    errors = [(f(exact, "w").float() - exact).sum(1).abs() for f in (with_feedback, nearest)]
    assert float(errors[0].max()) < step * 4 < float(errors[1].max())


def test_seeds_are_different_draws():
    exact = torch.randn(20, 50)
    first, again, second = (stochastic(exact, "w", seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_all_ways_are_compared_on_a_checkpoint(tmp_path, capsys):
    job = make_job(tmp_path)
    options = ("trainable.mode=weights", "optimizer.learning_rate=1e-4", "optimizer.steps=3")
    train(arguments(job, tmp_path / "run", *options, "checkpoint.save_every=3"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    capsys.readouterr()
    words = (checkpoint, "--text", job / "heldout.txt", "--tokens", 200, "--seeds", 2)
    assert compare(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "trained tensors, 200 tokens; training lowered the loss by" in lines[0]
    rows = {line[:22].strip(): line[22:].split() for line in lines[2:]}
    assert list(rows) == ["nearest", "error feedback", "stochastic, 2 seeds"]
    assert all(len(row) == 5 for row in rows.values())
    errors = {name: float(row[1]) for name, row in rows.items()}
    assert errors["nearest"] == min(errors.values())
