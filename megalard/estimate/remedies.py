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
    parallel, stages = config.parallel, list(config.all_stages().values())
    streams = [stream for stage in stages for stream in stage.all_streams().values()]
    longest = max(stream.data.context_length for stream in streams)
    possible = (
        (
            not parallel.activation_checkpointing,
            _of_parallel(
                "activation checkpointing",
                "activation_checkpointing true",
                activation_checkpointing=True,
            ),
        ),
        (
            not parallel.offload,
            _of_parallel(
                "keeping saved tensors in host memory",
                "offload true",
                activation_checkpointing=True,
                offload=True,
            ),
        ),
        (
            not parallel.offload_optimizer,
            _of_parallel(
                "keeping the optimizer's state in host memory",
                "offload_optimizer true",
                offload_optimizer=True,
            ),
        ),
        (
            not (parallel.shard_optimizer or parallel.offload_optimizer),
            _of_parallel(
                "dividing the optimizer's state over GPUs",
                "shard_optimizer true",
                shard_optimizer=True,
            ),
        ),
        (
            not parallel.shard_weights,
            _of_parallel(
                "dividing the weights of layers over GPUs",
                "shard_weights true",
                shard_weights=True,
                shard_optimizer=True,
            ),
        ),
        (
            parallel.gradient_dtype != "bfloat16",
            _of_parallel(
                "divided gradients in bfloat16",
                "gradient_dtype bfloat16",
                gradient_dtype="bfloat16",
            ),
        ),
        (
            any(stream.micro_batch > 1 for stream in streams),
            _of_stages("one block per micro-batch", "micro_batch 1", _one_block),
        ),
        (
            any(stage.trainable.mode == "all" for stage in stages),
            _of_stages(
                "training the projections q, k and v alone",
                "trainable.mode weights",
                _projections_alone,
            ),
        ),
        (
            any(s.trainable.mode == "lora" and s.trainable.lora.rank > 64 for s in stages),
            _of_stages("LoRA of rank 64", "trainable.lora.rank 64", _small_lora),
        ),
        (
            longest > 2048,
            _of_stages(
                "blocks of half the length",
                f"data.context_length {longest // 2}",
                lambda stage: _half_length(stage, longest),
            ),
        ),
    )
    return [change for is_possible, change in possible if is_possible]


def _of_parallel(words: str, setting: str, **values) -> Change:
    """Return a change of the section parallel; ``setting`` is without its name."""
    return Change(words, f"parallel.{setting}", lambda config: _with_parallel(config, **values))


def _of_stages(words: str, setting: str, change: Callable[[Config], Config]) -> Change:
    """Return a change of a run, or of each of its stages."""
    return Change(words, setting, lambda config: _with_stages(config, change))


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
