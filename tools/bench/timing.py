"""Measure time: on GPUs by CUDA events, on CPUs by the clock, over ranks by the slowest rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalard.parallel.collectives import all_gather_tokens
from megalard.parallel.mesh import SINGLE, Axis

_WARM_UP = 3
# About a millisecond, which is longer than the host takes to launch the timed work.
_BUSY_CYCLES = 2_000_000


@dataclass(frozen=True)
class Seconds:
    """The times of several runs of the same work, in seconds."""

    median: float
    shortest: float
    longest: float

    @classmethod
    def of(cls, times: list[float]) -> Seconds:
        """Summarize the times of runs."""
        return cls(statistics.median(times), min(times), max(times))


class Stopwatch:
    """A watch that marks places in a stream of work and returns the time between two marks.

    On a GPU the marks are CUDA events, so that taking one does not wait for the GPU.
    """

    def __init__(self, device: torch.device):
        self._is_gpu = device.type == "cuda"

    def mark(self) -> torch.cuda.Event | float:
        """Return a mark at this place."""
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        """Return the seconds between two marks, after the second one has been reached."""
        if not self._is_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def time_runs(run: Callable[[], object], device: torch.device, repeats: int) -> Seconds:
    """Time ``run`` after three runs to warm up.

    A GPU is kept busy while the host prepares each run, so that launches leave no gaps.
    """
    stopwatch, times = Stopwatch(device), []
    for _ in range(_WARM_UP + repeats):
        if device.type == "cuda":
            torch.cuda._sleep(_BUSY_CYCLES)
        start = stopwatch.mark()
        run()
        times.append(stopwatch.seconds(start, stopwatch.mark()))
    return Seconds.of(times[_WARM_UP:])


def slowest_rank_seconds(
    run: Callable[[], object], axis: Axis, device: torch.device, repeats: int
) -> float:
    """Return the median over runs of the time of the slowest rank; a collective call."""
    times = []
    for _ in range(1 + repeats):
        synchronize(device, axis)
        start = time.perf_counter()
        run()
        synchronize(device, SINGLE)
        local = torch.tensor([time.perf_counter() - start], device=device)
        times.append(float(all_gather_tokens(local, axis).max()))
    return statistics.median(times[1:])


def synchronize(device: torch.device, axis: Axis) -> None:
    """Wait for the other ranks of the axis, and for all work on the device."""
    if axis.size > 1:
        dist.barrier(group=axis.group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class MatrixProduct:
    """A product of two random square matrices, to compare other work with.

    Attributes:
        size: rows and columns of each matrix.
        dtype: the dtype, such as ``bfloat16``.
        flops: the measured rate in FLOP/s.
    """

    size: int
    dtype: str
    flops: float

    def __str__(self) -> str:
        return f"{self.size}³ {self.dtype} matrix product: {self.flops / 1e12:.3g} TFLOP/s"


def measure_matrix_product(device: torch.device, dtype: torch.dtype) -> MatrixProduct:
    """Measure the rate of a product that fills a GPU, or of a small one on a CPU."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = time_runs(lambda: a @ b, device, repeats=10).median
    return MatrixProduct(size, str(dtype).removeprefix("torch."), 2 * size**3 / seconds)
