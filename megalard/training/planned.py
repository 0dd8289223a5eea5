"""Plan a run that does not exist yet: from the shape of its model and its configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megalard.config.schema import Config
from megalard.errors import UserError
from megalard.estimate.gpus import Machines
from megalard.estimate.layouts import Candidate, Check, candidates, fastest_that_fits
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.remedies import more_gpus, remedies
from megalard.estimate.report import PlanResult
from megalard.model.rope import scaled_config, window_of
from megalard.model.spec import ModelSpec, read_spec, spec_from_config, spec_from_file
from megalard.parallel.tensor.slices import check_divisible
from megalard.training.plan import check_division, check_stream, naming_stream


def read_shape(path: Path) -> ModelSpec:
    """Return the shape of a model from its directory, or from its ``config.json`` alone.

    Raises:
        UserError: there is no such file, or the model is not supported.
    """
    if path.is_dir() or path.suffix != ".json":
        return read_spec(path)
    try:
        return spec_from_file(path)
    except FileNotFoundError:
        raise UserError(
            f"there is no file {path}: give a model directory or its config.json"
        ) from None


def check_of(config: Config, spec: ModelSpec) -> Check:
    """Return the check that refuses configurations and layouts that a run would refuse.

    Args:
        config: the run, whose RoPE gives the student's window.
        spec: the shape of the teacher.

    Raises:
        UserError: the student's RoPE cannot be derived.
    """
    window = window_of(spec, None)
    native = min(config.model.native_context or window, window)
    if config.rope.type == "checkpoint":
        student = read_spec(config.model.student or "")
    else:
        student = spec_from_config(scaled_config(spec, config.rope, native, spec), "the student")

    def check(changed: Config, layout: RankLayout) -> None:
        mesh = layout.mesh
        check_divisible(spec, layout.tp)
        check_division(changed, mesh)
        for stage, stage_config in changed.all_stages().items():
            for name, stream in stage_config.all_streams().items():
                with naming_stream(name, stage_config, stage):
                    check_stream(stream, native, student, mesh)

    return check


def plan_run(config: Config, spec: ModelSpec, machines: Machines, check: Check) -> PlanResult:
    """Return what a run needs on the given GPUs, and what to change if it does not fit.

    Raises:
        UserError: no layout can run, whatever its memory.
    """
    possible, refused = candidates(config, spec, machines, check)
    if not possible:
        # A layout with one tp and cp rank fails for the reason that is easiest to mend.
        raise UserError(refused[min(refused, key=lambda layout: (layout.tp, layout.cp))])
    fitting = [one for one in possible if one.fits]
    least = min(possible, key=lambda one: one.needed)
    return PlanResult(
        config,
        spec,
        machines,
        fitting,
        least,
        _faster(config, spec, machines, check, fitting),
        [] if fitting else remedies(config, spec, machines, check, least),
        None if fitting else more_gpus(config, spec, machines, check),
    )


def _faster(config, spec, machines, check, fitting: list[Candidate]) -> Candidate | None:
    """Return the fastest layout that fits without activation checkpointing, if it is faster."""
    if not fitting or not config.parallel.activation_checkpointing or config.parallel.offload:
        return None
    parallel = dataclasses.replace(config.parallel, activation_checkpointing=False)
    without = dataclasses.replace(config, parallel=parallel)
    best = fastest_that_fits(without, spec, machines, check)
    return best if best is not None and best.seconds < fitting[0].seconds else None
