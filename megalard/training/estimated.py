"""The estimate of a run on the ranks that it was started with: refused, or compared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from megalard.config.schema import Config
from megalard.errors import UserError
from megalard.estimate.gpus import GIB, NETWORK, Machines, gpu_of
from megalard.estimate.host import HOST
from megalard.estimate.layouts import check_host_memory
from megalard.estimate.memory import (
    GRADIENTS,
    MASTERS,
    MEMORY_ERROR,
    MOMENTS,
    STUDENT,
    TEACHER,
    Memory,
    memory_of,
    stage_memory,
)
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.time import run_times
from megalard.model.spec import ModelSpec
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.divided_weights import kept_bytes
from megalard.parallel.mesh import Mesh
from megalard.training.step import Distiller


def layout_of(mesh: Mesh) -> RankLayout:
    """Return the layout of the ranks that were started."""
    return RankLayout(mesh.dp.size, mesh.cp.size, mesh.tp.size)


def machines_of(mesh: Mesh) -> Machines | None:
    """Return the GPUs that a run was started on; None on a CPU or for GPUs without known rates."""
    gpu = gpu_of(mesh.device)
    if gpu is None:
        return None
    per_node = _ranks_of_node(mesh)
    return Machines(gpu, per_node, -(-mesh.world.size // per_node), NETWORK)


def _ranks_of_node(mesh: Mesh) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world.size))


def host_memory_of_node() -> int | None:
    """Return the bytes of memory that this node's processes may use; None if they are not known.

    This is the physical memory, or the limit of the container if it is lower (cgroup version 2).
    """
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    return min(physical, int(limit)) if limit.isdecimal() else physical


def check_fits(config: Config, spec: ModelSpec, mesh: Mesh) -> None:
    """Refuse a run that cannot fit into the memory of its GPUs and hosts, before weights are read.

    On a CPU nothing is refused.

    Raises:
        UserError: on every rank, if the run cannot fit on one of them.
    """
    with checked_on_all_ranks(mesh.world):
        if _is_gpu(mesh):
            capacity = torch.cuda.get_device_properties(mesh.device).total_memory
            # Whether heads are repeated depends on the text, so this is the smaller estimate.
            memory = memory_of(config, spec, layout_of(mesh), repeats_kv=False)
            refuse_if_too_large(memory, capacity)
            check_host_memory(memory, _ranks_of_node(mesh), host_memory_of_node())


def refuse_if_too_large(memory: Memory, capacity: float) -> None:
    """Refuse an estimate that exceeds a GPU's memory by more than the estimate's error.

    Args:
        memory: the estimate.
        capacity: bytes of the GPU.

    Raises:
        UserError: the run cannot fit.
    """
    if memory.total * (1 - MEMORY_ERROR) <= capacity:
        return
    largest = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in memory.kinds.most_common(3))
    raise UserError(
        f"the run needs {memory.total / GIB:.1f} GiB per GPU (± {MEMORY_ERROR:.0%}; {largest}) but "
        f"the GPU has {capacity / GIB:.1f} GiB: megalard plan lists the layouts that fit and what "
        "each change saves"
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """What preflight measured.

    Attributes:
        state: bytes of the tensors between steps of the last stage on rank 0, by kind.
        peak: the largest allocation on any GPU in bytes; None on a CPU.
        step_seconds: stage to the seconds of a step.
    """

    state: dict[str, int]
    peak: int | None
    step_seconds: dict[str, float]


def state_bytes(distiller: Distiller) -> dict[str, int]:
    """Return the bytes of weights, masters, moments and gradients that a rank has, by kind.

    Masters and moments in host memory are one kind, with the gradients that are copied there.
    """
    teacher = [] if distiller.teacher is None else list(distiller.teacher.parameters())
    masters = distiller.masters.parameters
    # What is no master is a weight of the student: frozen, or rounded from a divided master.
    others = {id(parameter) for parameter in (*teacher, *masters)}
    alone = [x for x in distiller.student.decoder.parameters() if id(x) not in others]
    moments = [
        value
        for state in distiller.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.ndim
    ]
    weights = {TEACHER: kept_bytes(teacher), STUDENT: kept_bytes(alone)}
    gradients = {GRADIENTS: kept_bytes(distiller.masters.gradients)}
    if distiller.config.parallel.offload_optimizer:
        copies = [master.grad for master in masters if master.grad is not None]
        return weights | gradients | {HOST: kept_bytes([*masters, *moments, *copies])}
    return weights | {MASTERS: kept_bytes(masters), MOMENTS: kept_bytes(moments)} | gradients


def comparison_lines(
    config: Config, spec: ModelSpec, mesh: Mesh, measured: Measured
) -> Iterator[str]:
    """Yield the estimate and the measurement side by side."""
    layout, machines = layout_of(mesh), machines_of(mesh)
    last = stage_memory(config, len(config.all_stages()) - 1, spec, layout)
    estimated = last.kinds + last.host
    rows = [(kind, size_text(estimated[kind]), size_text(x)) for kind, x in measured.state.items()]
    if measured.peak is not None:
        peak = memory_of(config, spec, layout).total
        rows.append(("peak memory of a GPU", size_text(peak), size_text(measured.peak)))
    if machines is not None:
        for name, time in run_times(config, spec, layout, machines).items():
            seconds = measured.step_seconds[name]
            rows.append((f"a step of {name}", f"{time.seconds:.3f} s", f"{seconds:.3f} s"))
    yield f"{'':<32}{'estimate':>14}{'measured':>14}"
    for name, estimate, value in rows:
        yield f"{name:<32}{estimate:>14}{value:>14}"


def _is_gpu(mesh: Mesh) -> bool:
    return mesh.device.type == "cuda"


def size_text(size: float) -> str:
    """Return a number of bytes in GiB or, if it is small, in KiB."""
    return f"{size / GIB:.3f} GiB" if size >= GIB / 100 else f"{size / 2**10:.1f} KiB"
