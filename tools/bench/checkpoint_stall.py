"""The cost of a save to the steps of a run, in the foreground and in the background."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megalard.checkpoint.open import StoredModel
from megalard.checkpoint.sharded.save_load import checkpoint_axis
from megalard.evaluation.measure import check_lengths
from megalard.parallel.agreement import checked_on_all_ranks, from_rank_0
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Axis, Mesh, build_mesh
from megalard.training.origins import Origins
from megalard.training.saver import Saver
from megalard.training.step import Distiller
from tools.bench.checkpoint_files import scratch_directory
from tools.bench.random_model import RandomWeights, random_spec
from tools.bench.random_run import make_config, make_distiller, random_batches
from tools.bench.results import Table, describe_environment, print_environment
from tools.bench.shapes import SHAPES

KINDS = ("foreground", "background")
_WINDOW = 4096
_WARM_UP_STEPS = 5
# Steps between two saves, over which the cost of a save is spread.
_INTERVAL_STEPS = 50


def measure(options: argparse.Namespace) -> tuple[dict, list[dict], dict] | None:
    """Measure both kinds of saves and print a table; a collective call of all ranks.

    Returns:
        On rank 0 the environment, the results, and facts that concern all results.

    Raises:
        UserError: on every rank, if the directory cannot be written or the ranks cannot share the
            model.
    """
    mesh = build_mesh(options.device, options.tp or _world_size())
    check_lengths([options.tokens], 1, "--tokens")
    run = Steps(options, mesh)
    environment, axis = describe_environment(mesh.device), checkpoint_axis(mesh)
    run.take(_WARM_UP_STEPS)
    plain = statistics.median(run.take(options.steps))
    state_bytes = 12 * sum(
        parameter.numel() for parameter in run.distiller.student.trained.values()
    )
    report = Report(mesh.is_rank_0, options, environment, plain, state_bytes)
    with shared_scratch(options.scratch, mesh) as scratch:
        for kind in KINDS:
            report.add(measure_saves(run, kind, scratch / kind, plain, options.steps, axis))
    facts = {"step_seconds": plain, "state_bytes_per_rank": state_bytes}
    return (environment, report.results, facts) if mesh.is_rank_0 else None


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def shared_scratch(parent: Path, mesh: Mesh) -> Iterator[Path]:
    """Make one scratch directory for all ranks; a collective call."""
    directory = None
    with checked_on_all_ranks(mesh.world):
        if mesh.is_rank_0:
            directory = scratch_directory(parent)
    path = from_rank_0(None if directory is None else directory.name, mesh.world)
    try:
        yield Path(path)
        if mesh.world.size > 1:
            dist.barrier(group=mesh.world.group)
    finally:
        if directory is not None:
            directory.cleanup()


class Steps:
    """A run of the trainer on random weights and tokens.

    Attributes:
        distiller: its state.
        origins: the model that it starts from, which has no files.
        number: the number of steps taken so far.
    """

    def __init__(self, options: argparse.Namespace, mesh: Mesh):
        spec = random_spec(options.shape, _WINDOW)
        rank = min(1024, SHAPES[options.shape]["hidden_size"] // 4)
        config = make_config(
            {
                "trainable.lora.rank": rank,
                "trainable.lora.alpha": 2 * rank,
                "data.context_length": options.tokens,
                "optimizer.steps": 10**6,
                "optimizer.global_batch": mesh.dp.size,
                "parallel.tp": mesh.tp.size,
                "run.device": options.device,
            }
        )
        self.distiller = make_distiller(config, spec, mesh)
        weights = RandomWeights(spec, options.shape)
        self.origins = Origins(StoredModel(weights.directory, "huggingface", spec, weights, ()))
        self.number = 0
        self._batches = random_batches(config, spec, mesh)

    def take(self, count: int) -> list[float]:
        """Take steps; return the seconds of each."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.distiller.step(self._batches, self.number)
            seconds.append(time.perf_counter() - start)
            self.number += 1
        return seconds

    def sections(self, step: int) -> dict:
        """Return the sections of a manifest, except ``base`` and ``teacher``."""
        config = self.origins.base.spec.hf_config
        empty = {"trained": None, "training": None, "written_by": {}}
        return {"kind": "training", "config": config, **empty, "step": step}


def measure_saves(
    run: Steps, kind: str, folder: Path, plain: float, steps: int, axis: Axis
) -> dict[str, object]:
    """Measure one save of a kind; a collective call of all ranks.

    Args:
        plain: the seconds of a step without a save.
        steps: the smallest number of steps to take after the save.
    """
    distiller: Distiller = run.distiller
    mesh, is_background = distiller.mesh, kind == "background"
    settings = replace(distiller.config.checkpoint, asynchronous=is_background, keep_last=1)
    saver = Saver(folder, distiller.config.steps, run.origins, (), settings, axis)
    saver.begin_stage(distiller, run.sections)
    with saver:
        saver.save(run.number)  # the first save allocates the memory that later saves use again
        saver.wait()
        start = time.perf_counter()
        saver.save(run.number + 1)
        held_seconds = time.perf_counter() - start
        after: list[float] = []
        written = time.perf_counter()
        is_writing = torch.ones(1, device=mesh.device)
        while len(after) < steps or is_writing:  # as many steps on every rank
            after += run.take(1)
            all_reduce(is_writing.fill_(saver.is_writing()), mesh.world, dist.ReduceOp.MAX)
            if is_writing:
                written = time.perf_counter()
    slowed_seconds = max(0.0, sum(after) - plain * len(after))
    return {
        "save": kind,
        "held_seconds": held_seconds,
        "steps_after": len(after),
        "slowed_seconds": slowed_seconds,
        "written_after_seconds": written - start,
        "share_of_step": (held_seconds + slowed_seconds) / (_INTERVAL_STEPS * plain),
    }


class Report:
    """A table of the results, which rank 0 prints as they come.

    Attributes:
        results: the results as JSON takes them.
    """

    def __init__(
        self,
        is_rank_0: bool,
        options: argparse.Namespace,
        environment: dict[str, str],
        plain: float,
        state_bytes: int,
    ):
        self.results: list[dict] = []
        self._table = None
        if is_rank_0:
            print_environment(environment)
            print(
                f"{options.shape}, {options.tokens:,} tokens per step: a step without a save takes "
                f"{plain:.3f} s; the state has {state_bytes / 1e9:.2f} GB per rank\n"
            )
            self._table = Table(
                ("save", 10), "holds the run, s", "steps after", "slower by, s", "written after, s",
                f"share of a step, one save per {_INTERVAL_STEPS}",
            )  # fmt: skip

    def add(self, result: dict) -> None:
        """Add and print one result."""
        self.results.append(result)
        if self._table is not None:
            self._table.row(
                result["save"],
                f"{result['held_seconds']:.3f}",
                result["steps_after"],
                f"{result['slowed_seconds']:.3f}",
                f"{result['written_after_seconds']:.1f}",
                f"{result['share_of_step']:.2%}",
            )
