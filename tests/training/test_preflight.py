"""A preflight takes two real steps, writes nothing, and refuses losses that train nothing."""

from __future__ import annotations

import re

import pytest

from megalard.training import preflight
from megalard.training.step import Distiller
from tests.command_line import megalard, refusal
from tests.jobs import arguments, snapshot


def run_preflight(small_job, tmp_path, *options: str) -> int:
    """Run ``megalard preflight``; return its exit status."""
    return megalard("preflight", *arguments(small_job, tmp_path / "output", *options))


def test_a_preflight_reports_and_writes_nothing(small_job, tmp_path, capsys):
    before = snapshot(small_job)
    assert run_preflight(small_job, tmp_path) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "output").exists() and snapshot(small_job) == before
    for line in (
        "trained: 1,280 parameters in 12 tensors",
        "gradients: finite and not zero for all 12 trained tensors",
        "ranks: dp 1 x cp 1 x tp 1 on cpu",
        "preflight passed; nothing was written",
    ):
        assert line in printed.splitlines(), line
    assert re.search(r"loss: \d\.\d{5} -> \d\.\d{5}\n", printed)
    assert re.search(r"time: .* s per step of 128 tokens .* for 8 steps \(1,024 tokens\)", printed)
    assert re.search(r"peak memory: \d+\.\d\d GiB on the rank that uses most", printed)
    # By kind and full shape, counted over the layers.
    assert "     2 x model.layers.self_attn.q_proj.lora_A [4, 32]" in printed.splitlines()
    assert "     2 x model.layers.self_attn.k_proj.lora_B [16, 4]" in printed.splitlines()


def test_the_frequencies_before_and_after_are_printed(small_job, tmp_path, capsys):
    """Four pairs of 8 features: theta^(-i / 4), divided by 4 by linear scaling."""
    assert run_preflight(small_job, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "RoPE: window 64 -> 256" in printed
    rows = re.findall(r"│\s*(\d) │\s*(\S+) │\s*(\S+) │\s*(\S+) │", printed)
    assert rows == [
        ("0", "1", "4", "4.0000"),
        ("1", "10", "40", "4.0000"),
        ("2", "100", "400", "4.0000"),
        ("3", "1000", "4000", "4.0000"),
    ]
    assert "cos/sin factor: teacher 1.0000, student 1.0000 (linear)" in printed


def test_of_many_pairs_some_are_printed(small_job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "_ROPE_ROWS", 2)
    assert run_preflight(small_job, tmp_path) == 0
    rows = re.findall(r"^│\s*(\d) │", capsys.readouterr().out, re.MULTILINE)
    assert rows == ["0", "3"]


def test_gradients_that_are_all_zero_are_refused(small_job, tmp_path, capsys, monkeypatch):
    """A tensor that the loss does not depend on would never change in a long run."""
    accumulate = Distiller.accumulate

    def without_one(self, batches, number):
        result = accumulate(self, batches, number)
        for name, parameter in self.student.trained.items():
            if "layers.1" in name and "v_proj" in name:
                parameter.grad.zero_()
        return result

    monkeypatch.setattr(Distiller, "accumulate", without_one)
    line = refusal(capsys, "preflight", *arguments(small_job, tmp_path / "output"))
    assert (
        "preflight: the gradient of model.layers.1.self_attn.v_proj.lora_A is all zero after 2 "
        "steps (2 such tensors): the loss does not depend on what is to be trained; choose other "
        "terms or other weights"
    ) in line


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_refused(what, small_job, tmp_path, capsys, monkeypatch):
    accumulate = Distiller.accumulate

    def poisoned(self, batches, number):
        sums, counts = accumulate(self, batches, number)
        if what == "loss":
            return {name: values * float("nan") for name, values in sums.items()}, counts
        self.student.trained[sorted(self.student.trained)[0]].grad.view(-1)[0] = float("inf")
        return sums, counts

    monkeypatch.setattr(Distiller, "accumulate", poisoned)
    options = ("run.non_finite=skip",)
    line = refusal(capsys, "preflight", *arguments(small_job, tmp_path / "output", *options))
    assert "preflight step 1: loss " in line and line.endswith("compute_dtype float32")


def test_the_time_of_a_stage_is_of_all_its_steps(small_job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight.time, "perf_counter", iter(range(100)).__next__)
    assert run_preflight(small_job, tmp_path, "optimizer.steps=120") == 0
    expected = "time: 1.00 s per step of 128 tokens (128 tokens/s), 2.0 minutes for 120 steps"
    assert expected in capsys.readouterr().out
