"""What to change if no layout fits, what each change saves, and how many GPUs would do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from megalard.config.schema import Config
from megalard.estimate.gpus import GIB, Machines
from megalard.estimate.layouts import Candidate, Check, candidate, fastest_that_fits
from megalard.model.spec import ModelSpec

_GPUS_OF_A_NODE, _DOUBLINGS = 8, 6
_LEAST_SAVED = GIB // 20
"""Bytes per GPU that a change has to save to be named; less is printed as 0.0 GiB."""


@dataclass(frozen=True)
class Change:
    """A change of the configuration that needs less memory.

    Attributes:
        words: what is changed, as the subject of a sentence.
        setting: the setting to give.
        apply: returns a configuration with the change.
    """

    words: str
    setting: str
    apply: Callable[[Config], Config]


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


def changes(config: Config) -> list[Change]:
    """Return the changes that may save memory."""
    stages = list(config.all_stages().values())
    streams = [stream for stage in stages for stream in stage.all_streams().values()]
    result = []
    if not config.parallel.activation_checkpointing:
        result.append(
            Change(
                "activation checkpointing",
                "parallel.activation_checkpointing true",
                lambda c: _with_parallel(c, activation_checkpointing=True),
            )
        )
    if not config.parallel.offload:
        result.append(
            Change(
                "keeping saved tensors in host memory",
                "parallel.offload true",
                lambda c: _with_parallel(c, activation_checkpointing=True, offload=True),
            )
        )
    if not config.parallel.offload_optimizer:
        result.append(
            Change(
                "keeping the optimizer's state in host memory",
                "parallel.offload_optimizer true",
                lambda c: _with_parallel(c, offload_optimizer=True),
            )
        )
    if not (config.parallel.shard_optimizer or config.parallel.offload_optimizer):
        result.append(
            Change(
                "dividing the optimizer's state over GPUs",
                "parallel.shard_optimizer true",
                lambda c: _with_parallel(c, shard_optimizer=True),
            )
        )
    if not config.parallel.shard_weights:
        result.append(
            Change(
                "dividing the weights of layers over GPUs",
                "parallel.shard_weights true",
                lambda c: _with_parallel(c, shard_weights=True, shard_optimizer=True),
            )
        )
    if config.parallel.gradient_dtype != "bfloat16":
        result.append(
            Change(
                "divided gradients in bfloat16",
                "parallel.gradient_dtype bfloat16",
                lambda c: _with_parallel(c, gradient_dtype="bfloat16"),
            )
        )
    if any(stream.micro_batch > 1 for stream in streams):
        result.append(
            Change(
                "one block per micro-batch",
                "micro_batch 1",
                lambda c: _with_stages(c, _one_block),
            )
        )
    if any(stage.trainable.mode == "all" for stage in stages):
        result.append(
            Change(
                "training the projections q, k and v alone",
                "trainable.mode weights",
                lambda c: _with_stages(c, _projections_alone),
            )
        )
    if any(stage.trainable.mode == "lora" and stage.trainable.lora.rank > 64 for stage in stages):
        result.append(
            Change(
                "LoRA of rank 64",
                "trainable.lora.rank 64",
                lambda c: _with_stages(c, _small_lora),
            )
        )
    longest = max(stream.data.context_length for stream in streams)
    if longest > 2048:
        result.append(
            Change(
                "blocks of half the length",
                f"data.context_length {longest // 2}",
                lambda c: _with_stages(c, lambda stage: _half_length(stage, longest)),
            )
        )
    return result


def remedies(
    config: Config, spec: ModelSpec, machines: Machines, check: Check, least: Candidate
) -> list[Remedy]:
    """Return what each change saves, those that make a layout fit first, and all of them together.

    Args:
        least: the layout that needs least memory without a change.
    """
    results, everything = [], config
    for change in changes(config):
        remedy = _remedy(change, change.apply(config), spec, machines, check, least)
        if remedy.saved >= _LEAST_SAVED:
            everything = change.apply(everything)
            results.append(remedy)
    results.sort(key=lambda remedy: (remedy.best is None, -remedy.saved))
    if len(results) > 1:
        together = Change("all of these together", "as above", lambda _: everything)
        results.append(_remedy(together, everything, spec, machines, check, least))
    return results


def _remedy(
    change: Change,
    changed: Config,
    spec: ModelSpec,
    machines: Machines,
    check: Check,
    least: Candidate,
) -> Remedy:
    saved = least.needed - candidate(changed, spec, least.layout, machines).needed
    return Remedy(change, saved, fastest_that_fits(changed, spec, machines, check))


def more_gpus(
    config: Config, spec: ModelSpec, machines: Machines, check: Check
) -> tuple[Machines, Candidate] | None:
    """Return the smallest number of GPUs that was tried and fits, with its fastest layout.

    The GPUs of a node are doubled up to 8, and then the nodes, up to 64 times as many.
    """
    while machines.per_node * 2 <= _GPUS_OF_A_NODE:
        machines = dataclasses.replace(machines, per_node=machines.per_node * 2)
        if (best := fastest_that_fits(config, spec, machines, check)) is not None:
            return machines, best
    for _ in range(_DOUBLINGS):
        machines = dataclasses.replace(machines, nodes=machines.nodes * 2)
        if (best := fastest_that_fits(config, spec, machines, check)) is not None:
            return machines, best
    return None


def _with_parallel(config: Config, **values) -> Config:
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


def _projections_alone(config: Config) -> Config:
    is_all = config.trainable.mode == "all"
    return _with_trainable(config, mode="weights") if is_all else config


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
