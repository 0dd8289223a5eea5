"""The step's benchmark: its parts add up, and a trace is read right."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest


@pytest.fixture
def step_trace(monkeypatch):
    return importlib.import_module("tools.bench.step_trace")


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def kernel(name: str, launched: float, ts: float, dur: float, tid: int = 1) -> list[dict]:
    number = int(launched * 10)
    return [
        event("cuda_runtime", "cudaLaunchKernel", launched, 1, tid, correlation=number),
        event("kernel", name, ts, dur, 0, correlation=number),
    ]


def test_kernels_count_for_the_part_that_launched_them(step_trace):
    """Two streams, autograd's thread, kernels that run after their part, and one in no part."""
    events = [
        event("user_annotation", "teacher", 0, 10),
        event("user_annotation", "student", 10, 10),
        event("user_annotation", "backward", 20, 20),
        event("user_annotation", "ProfilerStep", 0, 100),
        *kernel("gemm", 5, 100, 30),
        *kernel("gemm", 12, 130, 20),
        *kernel("copy", 15, 140, 20),  # another stream, half beside the product
        *kernel("gemm", 25, 200, 50, tid=2),
        *kernel("adam", 60, 250, 10),
        {"ph": "M", "name": "process_name"},
    ]
    trace = step_trace.read_trace(events)
    us = pytest.approx
    assert {k: v * 1e6 for k, v in trace.parts.items() if v} == {
        "teacher": us(30), "student": us(40), "backward": us(50), "other": us(10)
    }  # fmt: skip
    assert trace.span * 1e6 == us(160)
    assert trace.gap * 1e6 == us(40)
    assert trace.busy == us(120 / 160)
    assert trace.kernels[0] == ("gemm", us(100e-6), 3)


def test_the_benchmark_prints_every_part(tmp_path):
    file = tmp_path / "step.json"
    command = (
        f"-m tools.bench.step --shape tiny --tokens 64 --rank 4 --dtype float32 --device cpu "
        f"--repeats 1 --warm-up 1 --recompute yes --json {file}"
    )
    run = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (result,) = json.loads(file.read_text())["results"]
    parts, span = result["trace"]["parts"], result["trace"]["span"]
    assert min(seconds for part, seconds in parts.items() if part != "other") > 0
    assert sum(parts.values()) == pytest.approx(span)
    assert parts["other"] < 0.5 * span
    for name, seconds in parts.items():
        assert f"{name} {seconds * 1e3:.1f}" in run.stdout
    assert "recipe_minutes" not in result and "quoted" not in result
