"""The monitor: which steps are reported, the rates, and a file that is always JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import time

import pytest
import torch

from megalard.reporter import Reporter
from megalard.training.monitor import Monitor, Pace
from megalard.training.step import StepResult
from tests.command_line import user_error

# Four steps of 100 tokens and 1000 operations, then six of 50 tokens and 4000 operations.
PACES = [Pace("short", 4, 100, 1000.0), Pace("long", 10, 50, 4000.0)]
CPU = torch.device("cpu")


def result(loss: float = 2.0, skipped: str | None = None) -> StepResult:
    return StepResult(loss, {"q": 0.5, "v": 1.5}, 0.25, 1e-3, skipped)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def make(tmp_path, clock):
    """A function that makes a monitor, which is closed after the test."""
    monitors = []

    def make(paces=PACES, ranks=1, log_every=1, is_rank_0=True, **options) -> Monitor:
        reporter = Reporter(is_rank_0)
        monitors.append(Monitor(tmp_path, paces, ranks, log_every, reporter, CPU, **options))
        return monitors[-1]

    yield make
    for monitor in monitors:
        monitor.close()


def lines_of(tmp_path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_step_is_one_line_of_values(make, clock, tmp_path, capsys):
    monitor = make(ranks=4, peak_flops=250.0)
    clock[0] = 2.0
    monitor.report(1, result())
    (line,) = lines_of(tmp_path)
    assert line.pop("memory_gib") > 0
    assert line == {
        "step": 1,
        "stage": "short",
        "tokens": 100,
        "loss": 2.0,
        "loss_q": 0.5,
        "loss_v": 1.5,
        "gradient_norm": 0.25,
        "learning_rate": 1e-3,
        "tokens_per_second": 50.0,
        # 1000 operations in 2 s on four GPUs of 250 operations per second.
        "mfu": 0.5,
        "skipped": None,
    }
    printed = capsys.readouterr().out
    assert "short step 1/10  loss 2.0000 (q 0.5000 v 1.5000)  grad 0.25  lr 0.001" in printed
    assert "50 tokens/s (12 per rank)  MFU 50.0%" in printed
    # Three more steps of 1000 operations and six of 4000, at 500 operations per second.
    assert printed.rstrip().endswith("ETA 0:00:54")


def test_layers_and_norms_of_kinds_are_in_the_file(make, clock, tmp_path):
    monitor = make()
    clock[0] = 1.0
    layers = {"q": [1 / 3, None, math.inf]}
    monitor.report(1, dataclasses.replace(result(), layers=layers, gradient_norms={"mlp": 0.5}))
    (line,) = lines_of(tmp_path)
    assert line["layers"] == {"q": [0.333333, None, None]} and line["gradient_norm_mlp"] == 0.5


def test_tokens_are_counted_over_the_stages(make, clock, tmp_path):
    monitor = make()
    for number in (4, 5, 10):
        clock[0] += 1.0
        monitor.report(number, result())
    assert [line["tokens"] for line in lines_of(tmp_path)] == [400, 450, 700]
    assert [line["stage"] for line in lines_of(tmp_path)] == ["short", "long", "long"]


def test_a_run_without_stages_names_none(make, clock, tmp_path, capsys):
    monitor = make([Pace(None, 3, 10, 1.0)])
    clock[0] = 1.0
    monitor.report(1, result())
    assert "stage" not in lines_of(tmp_path)[0]
    assert capsys.readouterr().out.startswith("step 1/3 ")


def test_steps_are_reported_at_the_interval_at_the_ends_and_when_skipped(make, clock, tmp_path):
    monitor = make(log_every=3)
    for number in range(1, 11):
        clock[0] += 1.0
        monitor.report(number, result(skipped="the loss is inf" if number == 7 else None))
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [3, 4, 6, 7, 9, 10]
    # Rates are over all steps since the last report.
    assert {line["tokens_per_second"] for line in lines[:2]} == {100.0}
    assert {line["tokens_per_second"] for line in lines[2:]} == {50.0}
    assert lines[3]["skipped"] == "the loss is inf"


def test_the_time_between_stages_is_left_out(make, clock, tmp_path):
    monitor = make()
    clock[0] = 1000.0
    monitor.restart_clock(4)
    clock[0] = 1002.0
    monitor.report(5, result())
    assert lines_of(tmp_path)[0]["tokens_per_second"] == 25.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_not_finite_is_null_in_the_file(loss, make, clock, tmp_path):
    monitor = make()
    clock[0] = 1.0
    monitor.report(1, result(loss))
    assert lines_of(tmp_path)[0]["loss"] is None


def test_lines_of_steps_that_are_taken_again_are_removed(make, clock, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + '{"step": 4, "lo')
    monitor = make(steps_done=2)
    clock[0] = 1.0
    monitor.report(3, result())
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    assert "loss" not in lines_of(tmp_path)[1] and lines_of(tmp_path)[2]["loss"] == 2.0


@pytest.mark.parametrize("bad", [b"\xff\n", b"[" * 100_000 + b"\n", b"3\n", b"{}\n", b"\n"])
def test_a_line_that_cannot_be_read_is_dropped(bad, make, clock, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'{"step": 2}\n')
    monitor = make(steps_done=2)
    clock[0] = 1.0
    monitor.report(3, result())
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["directory", "pipe", "link loop", "board"])
def test_what_is_in_the_way_of_the_files_is_named(kind, make, tmp_path):
    path = tmp_path / "metrics.jsonl"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link loop":
        path.symlink_to(path)
    else:
        (tmp_path / "tensorboard").touch()
    sentence = user_error(make, steps_done=2)
    assert str(tmp_path / "tensorboard" if kind == "board" else path) in sentence


def test_too_few_open_files_are_named(make, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    make()
    # The limit is on the numbers of files, of which the lowest that is free is taken next.
    next_number = os.open(os.devnull, os.O_RDONLY)
    os.close(next_number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_number, limits[1]))
    try:
        sentence = user_error(make, steps_done=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert f"cannot write {tmp_path}: Too many open files" in sentence


def test_other_ranks_write_nothing(make, tmp_path, capsys):
    make(is_rank_0=False).report(1, result())
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
