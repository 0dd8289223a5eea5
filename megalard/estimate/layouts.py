"""Which layouts of ranks fit, and which of them is fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megalard.config.schema import Config
from megalard.errors import UserError
from megalard.estimate.gpus import GIB, Machines
from megalard.estimate.host import SETTINGS
from megalard.estimate.memory import MEMORY_ERROR, Memory, memory_of
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.time import StepTime, run_times
from megalard.model.spec import ModelSpec
from megalard.parallel.context.schedule import COVERS
from megalard.parallel.tensor.slices import tensor_parallel_sizes

Check = Callable[[Config, RankLayout], None]
"""Raises a UserError if a configuration cannot run on a layout."""

# What a GPU needs besides torch's tensors: the CUDA context, kernels and NCCL's buffers, and what
# torch's allocator holds without using it. Assumed, not measured.
CONTEXT_BYTES = 2**30
ALLOCATOR_SHARE = 0.02


@dataclass(frozen=True)
class Candidate:
    """A layout with its estimate.

    Attributes:
        layout: the layout of ranks.
        memory: of one rank.
        times: stage to the time of a step.
        capacity: the memory of a GPU in bytes.
    """

    layout: RankLayout
    memory: Memory
    times: dict[str, StepTime]
    capacity: float

    @property
    def allocator(self) -> int:
        """Bytes that a GPU needs besides the tensors."""
        return CONTEXT_BYTES + round(ALLOCATOR_SHARE * self.memory.total)

    @property
    def needed(self) -> int:
        """Bytes that a GPU needs."""
        return self.memory.total + self.allocator

    @property
    def fits(self) -> bool:
        """Whether the GPU has the bytes that the estimate asks for."""
        return self.needed <= self.capacity

    @property
    def is_close(self) -> bool:
        """Whether the estimate's error decides if the layout fits."""
        return abs(self.needed - self.capacity) <= MEMORY_ERROR * self.memory.total

    @property
    def seconds(self) -> float:
        """Seconds of the steps of all stages."""
        return sum(time.seconds * time.steps for time in self.times.values())


def layouts(spec: ModelSpec, machines: Machines) -> Iterator[RankLayout]:
    """Yield the layouts of all ranks whose tp axis stays within a node.

    The search is over cp axes for which a smallest difference cover is known.
    """
    for tp in tensor_parallel_sizes(spec):
        if machines.per_node % tp:
            continue
        data = machines.ranks // tp
        for cp in COVERS:
            if data % cp == 0:
                yield RankLayout(data // cp, cp, tp)


def candidates(
    config: Config, spec: ModelSpec, machines: Machines, check: Check
) -> tuple[list[Candidate], dict[RankLayout, str]]:
    """Return the estimates of all layouts that can run, the fastest first.

    Returns:
        The candidates, and why each of the other layouts cannot run, for example because a node
        has too little host memory.
    """
    possible, refused = [], {}
    for layout in layouts(spec, machines):
        try:
            check(config, layout)
        except UserError as error:
            refused[layout] = str(error)
            continue
        one = candidate(config, spec, layout, machines)
        try:
            check_host_memory(one.memory, machines.per_node, machines.host_memory)
        except UserError as error:
            refused[layout] = f"with {layout} {error}"
            continue
        possible.append(one)
    return sorted(possible, key=lambda one: (one.seconds, one.needed)), refused


def check_host_memory(memory: Memory, per_node: int, capacity: float | None) -> None:
    """Refuse an estimate that exceeds the host memory of a node by more than its error.

    Args:
        memory: the estimate of one rank.
        per_node: ranks of a node.
        capacity: bytes of a node; None if they are not known.

    Raises:
        UserError: the host memory does not suffice.
    """
    needed = memory.host.total() * per_node
    if capacity is None or needed * (1 - MEMORY_ERROR) <= capacity:
        return
    kinds = ", ".join(f"{kind} {size * per_node / GIB:.1f}" for kind, size in memory.host.items())
    settings = " or ".join(name for kind, name in SETTINGS.items() if kind in memory.host)
    raise UserError(
        f"the run needs {needed / GIB:.1f} GiB of host memory per node ({kinds}) but a node has "
        f"{capacity / GIB:.1f} GiB: set {settings} false, or use more nodes"
    )


def candidate(config: Config, spec: ModelSpec, layout: RankLayout, machines: Machines) -> Candidate:
    """Return the estimate of one layout."""
    return Candidate(
        layout,
        memory_of(config, spec, layout),
        run_times(config, spec, layout, machines),
        machines.gpu.memory,
    )


def fastest_that_fits(
    config: Config, spec: ModelSpec, machines: Machines, check: Check
) -> Candidate | None:
    """Return the fastest layout that fits; None if none does."""
    possible, _ = candidates(config, spec, machines, check)
    return next((one for one in possible if one.fits), None)
