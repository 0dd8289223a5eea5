"""Profile chosen steps: torch's profiler, the GPU's memory, and NCCL's flight recorder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megalard.parallel.mesh import Mesh
from megalard.reporter import Reporter

FOLDER = "profile"
# Allocations and frees of a step, of which a large one makes some 100,000.
_MEMORY_EVENTS = 1_000_000


@contextmanager
def profiled(output: Path, step: int, mesh: Mesh, reporter: Reporter) -> Iterator[None]:
    """Profile the block, which is one step, and write the results of this rank.

    The files are ``profile/step-000003-rank-00000.json.gz`` (a Chrome trace for Perfetto), and on
    GPUs ``.memory.pickle`` (for https://pytorch.org/memory_viz) and ``.nccl.pickle``. A file that
    cannot be written is warned about and does not end the run.

    Args:
        output: the output directory of the run.
        step: the number of the step, for the names of the files.
    """
    is_gpu = mesh.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with _memory_history() if is_gpu else nullcontext():
        with profile(activities=activities, record_shapes=True) as profiler:
            yield
            if is_gpu:
                torch.cuda.synchronize(mesh.device)
        stem = f"step-{step:06d}-rank-{mesh.world.rank:05d}"
        folder = output / FOLDER
        try:
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"{stem}.json.gz"))
            if is_gpu:
                torch.cuda.memory._dump_snapshot(str(folder / f"{stem}.memory.pickle"))
            trace = _flight_recorder()
            if trace is not None:
                (folder / f"{stem}.nccl.pickle").write_bytes(trace)
        except (OSError, RuntimeError) as error:
            reporter.warning(f"step {step} was profiled, but {folder} cannot be written: {error}")
            return
    reporter.line(f"step {step} was profiled: {folder}")


@contextmanager
def _memory_history() -> Iterator[None]:
    """Let the allocator note its allocations and frees during the block."""
    torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _flight_recorder() -> bytes | None:
    """Return what NCCL's flight recorder holds of this rank; None without NCCL."""
    if not dist.is_initialized() or dist.get_backend() != "nccl":
        return None
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    return None if dump is None else dump()
