"""A trace of a step: which part launched a kernel, and how busy the GPU was."""

from __future__ import annotations

import pytest

from tools.bench.step_trace import read_trace


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def kernel(name: str, launched: float, ts: float, dur: float, tid: int = 1) -> list[dict]:
    number = int(launched * 10)
    return [
        event("cuda_runtime", "cudaLaunchKernel", launched, 1, tid, correlation=number),
        event("kernel", name, ts, dur, 0, correlation=number),
    ]


def test_kernels_count_for_the_part_that_launched_them():
    """Two streams, autograd's thread, kernels that run after their part, and one in no part."""
    events = [
        event("user_annotation", "teacher", 0, 10),
        event("user_annotation", "student", 10, 10),
        event("user_annotation", "backward", 20, 20),
        event("user_annotation", "ProfilerStep", 0, 100),
        *kernel("gemm", 5, 100, 30),
        *kernel("gemm", 12, 130, 20),
        *kernel("copy", 15, 140, 20),  # on another stream, half of it during the product
        *kernel("gemm", 25, 200, 50, tid=2),
        *kernel("adam", 60, 250, 10),
        {"ph": "M", "name": "process_name"},
    ]
    trace = read_trace(events)
    us = pytest.approx
    assert {k: v * 1e6 for k, v in trace.parts.items() if v} == {
        "teacher": us(30), "student": us(40), "backward": us(50), "other": us(10)
    }  # fmt: skip
    assert trace.span * 1e6 == us(160)
    assert trace.gap * 1e6 == us(40)
    assert trace.busy == us(120 / 160)
    assert trace.kernels[0] == ("gemm", us(100e-6), 3)


def test_without_a_gpu_a_part_takes_as_long_as_its_ranges():
    events = [
        event("user_annotation", "teacher", 0, 10),
        event("user_annotation", "teacher", 20, 5),
        event("user_annotation", "backward", 30, 10),
    ]
    trace = read_trace(events)
    parts = {name: seconds * 1e6 for name, seconds in trace.parts.items() if seconds}
    assert parts == {
        n: pytest.approx(s) for n, s in dict(teacher=15, backward=10, other=15).items()
    }
    assert trace.span * 1e6 == pytest.approx(40)
    assert trace.busy is None and trace.gap is None
