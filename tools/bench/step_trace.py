"""Where the time of one step goes, by torch.profiler.

The parts of a step are the ranges that the trainer labels with ``torch.profiler.record_function``.
On a GPU, the time of a part is the time of the kernels and copies that were launched in it.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

PARTS = ("teacher", "student", "relations", "backward", "optimizer")
OTHER = "other"
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class StepTrace:
    """The times of one step on one rank, in seconds.

    Attributes:
        parts: label to time; ``other`` is the time that no label covers.
        span: from the start of the first kernel to the end of the last kernel.
        busy: the share of the span in which a kernel or a copy runs; None without a GPU.
        gap: the longest time within the span in which none runs; None without a GPU.
        kernels: (name, seconds, calls) of each kernel, the longest first.
    """

    parts: dict[str, float]
    span: float
    busy: float | None = None
    gap: float | None = None
    kernels: list[tuple[str, float, int]] = field(default_factory=list)


def trace_step(step: Callable[[], object], device: torch.device) -> StepTrace:
    """Run ``step`` twice under the profiler and return the trace of the second run.

    The first run pays for the start of the profiler.

    Raises:
        RuntimeError: the profiler sees no work on the GPU.
    """
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(schedule=schedule, acc_events=True) as profile:
        for _ in range(2):
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            profile.step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        trace = read_trace(json.loads(file.read_text())["traceEvents"])
    if device.type == "cuda" and trace.busy is None:
        raise RuntimeError("torch.profiler sees nothing on the GPU: it needs CUPTI, CUDA's tracer")
    return trace


def read_trace(events: Iterable[dict]) -> StepTrace:
    """Return the trace that the events of a Chrome trace describe; their times are microseconds."""
    events = [event for event in events if event.get("ph") == "X"]
    labels = [
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event["cat"] == "user_annotation" and event["name"] in PARTS
    ]
    on_gpu = [event for event in events if event["cat"] in _ON_GPU]
    if not on_gpu:
        return _trace_of_labels(labels)

    launch_times = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event["cat"] in _LAUNCHES and "correlation" in event.get("args", {})
    }
    parts = dict.fromkeys((*PARTS, OTHER), 0.0)
    times_of_kernel: dict[str, list[float]] = defaultdict(list)
    for event in on_gpu:
        # Autograd launches from another thread, while "backward" is open in the main thread.
        launched = launch_times.get(event["args"].get("correlation"), -1.0)
        covering = (name for start, end, name in labels if start <= launched < end)
        parts[next(covering, OTHER)] += event["dur"] / 1e6
        times_of_kernel[event["name"]].append(event["dur"] / 1e6)
    busy, gap, span = _occupation((e["ts"], e["ts"] + e["dur"]) for e in on_gpu)
    longest_first = sorted(times_of_kernel.items(), key=lambda item: -sum(item[1]))
    return StepTrace(
        parts,
        span / 1e6,
        busy / span,
        gap / 1e6,
        [(name, sum(times), len(times)) for name, times in longest_first],
    )


def _trace_of_labels(labels: list[tuple[float, float, str]]) -> StepTrace:
    """Return the trace of a CPU, where a part takes as long as its ranges."""
    span = max(end for _, end, _ in labels) - min(start for start, _, _ in labels)
    parts = dict.fromkeys(PARTS, 0.0)
    for start, end, name in labels:
        parts[name] += (end - start) / 1e6
    return StepTrace(parts | {OTHER: span / 1e6 - sum(parts.values())}, span / 1e6)


def _occupation(intervals: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the length of the union of intervals, its longest gap, and its extent."""
    busy = gap = 0.0
    start_of_all = covered_until = None
    for start, end in sorted(intervals):
        if covered_until is None:
            start_of_all = covered_until = start
        gap = max(gap, start - covered_until)
        busy += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return busy, gap, covered_until - start_of_all


def print_trace(trace: StepTrace) -> None:
    """Print where the time of the traced step went."""
    parts = "  ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in trace.parts.items())
    print(f"    traced step, ms: {parts}")
    if trace.busy is not None:
        print(
            f"    the GPU is busy for {trace.busy:.1%} of {trace.span * 1e3:.1f} ms; "
            f"its longest pause is {trace.gap * 1e6:.0f} us"
        )
    for name, seconds, calls in trace.kernels:
        print(f"    {seconds * 1e3:9.3f} ms {calls:6d} x {name[:90]}")
