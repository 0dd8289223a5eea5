"""Measured steps that train all weights, by where the optimizer's state is, and their estimates.

The files of docs/figures/optimizer_state are from ``tools.bench.step`` with ``--train all``. One of
four GPUs ran about three times slower than the others, so that no time of these files is compared.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from megalard.config.schema import Config
from megalard.estimate.gpus import GIB, NETWORK, Machines, parse_gpus
from megalard.estimate.memory import memory_of
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.report import HOST_SECONDS_PER_LAYER
from megalard.estimate.time import micro_step_time, step_time
from megalard.model.spec import ModelSpec
from tools.bench.planned_steps import FIGURES
from tools.bench.random_model import random_spec
from tools.bench.random_run import make_config
from tools.bench.step import OPTIMIZERS
from tools.bench.step_measurement import ALL_WEIGHTS

_SLOW_GPU = 4
"""The number of GPUs of the machine on which one GPU was slow."""

Pair = tuple[float, float]
"""What was measured, and the estimate."""


@dataclass(frozen=True)
class StateRow:
    """One measured step and its estimate.

    Attributes:
        name: the file.
        optimizer: where the state was, as ``tools.bench.step --optimizer`` calls it.
        gpus: the number of GPUs, all of them data-parallel.
        blocks: blocks of a micro-batch.
        between: bytes between steps.
        peak: the largest allocation in bytes.
        update: seconds of the update; None if they are not comparable.
        passes: seconds of the forward and backward pass; None if they are not comparable, or if
            the GPU waited for the host.
    """

    name: str
    optimizer: str
    gpus: int
    blocks: int
    between: Pair
    peak: Pair
    update: Pair | None
    passes: Pair | None

    def cells(self) -> list[str]:
        """Return the cells of a row."""
        return [
            f"`{self.name}`",
            self.optimizer,
            *(f"{size / GIB:.2f}" for size in self.between),
            *(f"{size / GIB:.2f}" for size in self.peak),
            f"{difference(self.peak):+.1%}",
            *_seconds(self.update),
            *_seconds(self.passes),
        ]


def difference(pair: Pair) -> float:
    """Return the estimate relative to the measurement, minus one."""
    return pair[1] / pair[0] - 1


def _seconds(pair: Pair | None) -> list[str]:
    if pair is None:
        return ["", "", ""]
    return [f"{pair[0]:.3f}", f"{pair[1]:.3f}", f"{difference(pair):+.1%}"]


def state_rows() -> list[StateRow]:
    """Return the measurements of docs/figures/optimizer_state."""
    rows = []
    for file in sorted((FIGURES / "optimizer_state").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        rows += [_row(file, content, result) for result in content["results"]]
    return rows


def _row(file: Path, content: dict, result: dict) -> StateRow:
    options, blocks = content["options"], content["options"]["micro_batch"]
    # This version of the benchmark did not record the number of ranks.
    match = re.search(r"_dp(\d+)", file.stem)
    assert match is not None, file
    gpus = int(match[1])
    config = make_config(
        {
            "model.compute_dtype": options["dtype"],
            "data.context_length": result["tokens"],
            "optimizer.global_batch": blocks * gpus,
            "optimizer.micro_batch": blocks,
            "parallel.activation_checkpointing": result["activation_checkpointing"],
            "parallel.gradient_dtype": options["gradient_dtype"],
            **ALL_WEIGHTS,
            **OPTIMIZERS[result["optimizer"]],
        }
    )
    spec, layout = random_spec(options["shape"], result["tokens"]), RankLayout(gpus)
    memory = memory_of(config, spec, layout)
    _, gpu = parse_gpus(content["environment"]["device"], None, None)
    update, passes = _times(config, spec, layout, Machines(gpu, gpus, 1, NETWORK))
    is_fast, waits = gpus < _SLOW_GPU, passes / spec.num_layers < HOST_SECONDS_PER_LAYER
    return StateRow(
        file.name,
        result["optimizer"],
        gpus,
        blocks,
        (result["between_steps_gib"] * GIB, memory.between_steps),
        (result["peak_gib"] * GIB, memory.total),
        (result["update_seconds"]["median"], update) if is_fast else None,
        (result["forward_backward_seconds"]["median"], passes) if is_fast and not waits else None,
    )


def _times(config: Config, spec: ModelSpec, layout: RankLayout, machines: Machines) -> Pair:
    """Return the estimated seconds of the update and of the passes of one micro-batch."""
    (stream,) = config.all_streams().values()
    passes = sum(micro_step_time(config, stream, spec, layout, machines).values())
    return sum(step_time(config, spec, layout, machines).values()) - passes, passes
