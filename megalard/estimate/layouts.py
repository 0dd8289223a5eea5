"""Which layouts of ranks fit, which of them is fastest, and what to change if none fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megalard.config.schema import Config
from megalard.errors import UserError
from megalard.estimate.gpus import Machines
from megalard.estimate.memory import MEMORY_ERROR, Memory, memory_of
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.time import StepTime, run_times
from megalard.model.spec import ModelSpec
from megalard.parallel.tensor.layout import tensor_parallel_sizes

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
    """Yield the layouts of all ranks whose tp axis stays within a node."""
    for tp in tensor_parallel_sizes(spec):
        if machines.per_node % tp:
            continue
        data = machines.ranks // tp
        for cp in (size for size in range(1, data + 1) if data % size == 0):
            yield RankLayout(data // cp, cp, tp)


def candidates(
    config: Config, spec: ModelSpec, machines: Machines, check: Check
) -> tuple[list[Candidate], dict[RankLayout, str]]:
    """Return the estimates of all layouts that can run, the fastest first.

    Returns:
        The candidates, and why each of the other layouts cannot run.
    """
    possible, refused = [], {}
    for layout in layouts(spec, machines):
        try:
            check(config, layout)
        except UserError as error:
            refused[layout] = str(error)
            continue
        possible.append(candidate(config, spec, layout, machines))
    return sorted(possible, key=lambda one: (one.seconds, one.needed)), refused


def candidate(config: Config, spec: ModelSpec, layout: RankLayout, machines: Machines) -> Candidate:
    """Return the estimate of one layout."""
    return Candidate(
        layout,
        memory_of(config, spec, layout),
        run_times(config, spec, layout, machines),
        machines.gpu.memory,
    )


@dataclass(frozen=True)
class Change:
    """A change of the configuration that needs less memory.

    Attributes:
        words: what is changed, as the subject of a sentence.
        config: the configuration with the change.
        setting: the setting to give.
    """

    words: str
    setting: str
    config: Config


@dataclass(frozen=True)
class Remedy:
    """What a change saves.

    Attributes:
        change: the change.
        saved: bytes per GPU, on the layout that needs least without the change.
        best: the fastest layout that fits with the change; None if none does.
    """

    change: Change
    saved: int
    best: Candidate | None


def changes(config: Config) -> Iterator[Change]:
    """Yield the changes that may save memory."""
    parallel = config.parallel
    if not parallel.activation_checkpointing:
        yield Change(
            "activation checkpointing",
            "parallel.activation_checkpointing true",
            _with_parallel(config, activation_checkpointing=True),
        )
    if not parallel.offload:
        yield Change(
            "keeping saved tensors in host memory",
            "parallel.offload true",
            _with_parallel(config, activation_checkpointing=True, offload=True),
        )
    if any(
        s.micro_batch > 1 for c in config.all_stages().values() for s in c.all_streams().values()
    ):
        yield Change("one block per micro-batch", "micro_batch 1", _with_stages(config, _one_block))
    if any(c.trainable.mode == "all" for c in config.all_stages().values()):
        yield Change(
            "training the projections q, k and v alone",
            "trainable.mode weights",
            _with_stages(config, lambda c: _with_trainable(c, mode="weights")),
        )
    ranks = [
        c.trainable.lora.rank for c in config.all_stages().values() if c.trainable.mode == "lora"
    ]
    if ranks and max(ranks) > 64:
        yield Change("LoRA of rank 64", "trainable.lora.rank 64", _with_stages(config, _small_lora))
    longest = max(
        s.data.context_length
        for c in config.all_stages().values()
        for s in c.all_streams().values()
    )
    if longest > 2048:
        yield Change(
            "blocks of half the length",
            f"data.context_length {longest // 2}",
            _with_stages(config, lambda c: _half_length(c, longest)),
        )


def remedies(
    config: Config, spec: ModelSpec, machines: Machines, check: Check, least: Candidate
) -> list[Remedy]:
    """Return what each change saves, those that make a layout fit first.

    Args:
        least: the layout that needs least memory without a change.
    """
    found = []
    for change in changes(config):
        saved = least.needed - candidate(change.config, spec, least.layout, machines).needed
        if saved <= 0:
            continue
        possible, _ = candidates(change.config, spec, machines, check)
        best = next((one for one in possible if one.fits), None)
        found.append(Remedy(change, saved, best))
    return sorted(found, key=lambda remedy: (remedy.best is None, -remedy.saved))


def more_nodes(
    config: Config, spec: ModelSpec, machines: Machines, check: Check
) -> Candidate | None:
    """Return the fastest layout that fits on as few nodes as possible, at most 64 times as many."""
    for power in range(1, 7):
        larger = dataclasses.replace(machines, nodes=machines.nodes * 2**power)
        possible, _ = candidates(config, spec, larger, check)
        best = next((one for one in possible if one.fits), None)
        if best is not None:
            return best
    return None


def _with_parallel(config: Config, **values: bool) -> Config:
    parallel = dataclasses.replace(config.parallel, **values)
    return dataclasses.replace(config, parallel=parallel)


def _with_trainable(config: Config, **values) -> Config:
    trainable = dataclasses.replace(config.trainable, **values)
    return dataclasses.replace(config, trainable=trainable)


def _with_stages(config: Config, change: Callable[[Config], Config]) -> Config:
    """Apply a change to a run, or to each of its stages."""
    if not config.stages:
        return change(config)
    stages = {}
    for name, stage_config in config.all_stages().items():
        changed = change(stage_config)
        stages[name] = dataclasses.replace(
            config.stages[name],
            trainable=changed.trainable,
            data=changed.data,
            streams=changed.streams,
            optimizer=changed.optimizer,
        )
    return dataclasses.replace(config, stages=stages)


def _one_block(config: Config) -> Config:
    return dataclasses.replace(
        config,
        streams={
            name: dataclasses.replace(stream, micro_batch=1)
            for name, stream in config.streams.items()
        },
        optimizer=dataclasses.replace(config.optimizer, micro_batch=1),
    )


def _small_lora(config: Config) -> Config:
    lora = dataclasses.replace(config.trainable.lora, rank=min(64, config.trainable.lora.rank))
    return _with_trainable(config, lora=lora)


def _half_length(config: Config, longest: int) -> Config:
    def shorter(data):
        if data.context_length < longest:
            return data
        return dataclasses.replace(data, context_length=longest // 2)

    return dataclasses.replace(
        config,
        data=shorter(config.data),
        streams={
            name: dataclasses.replace(stream, data=shorter(stream.data))
            for name, stream in config.streams.items()
        },
    )
