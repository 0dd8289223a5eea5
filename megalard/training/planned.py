"""Plan a run by estimates: before it exists, and on the ranks that it was started with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from megalard.config.schema import Config
from megalard.errors import UserError
from megalard.estimate.gpus import GIB, Machines, gpu_of
from megalard.estimate.layouts import Candidate, Check, candidate, candidates, more_nodes, remedies
from megalard.estimate.memory import MEMORY_ERROR, memory_of
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.report import PlanResult
from megalard.files.reading import read_json
from megalard.model.rope import scaled_config, window_of
from megalard.model.spec import ModelSpec, read_spec, spec_from_config
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.mesh import Mesh
from megalard.parallel.tensor.layout import check_divisible
from megalard.training.plan import Plan, check_stream, naming_stream


def read_shape(path: Path) -> ModelSpec:
    """Return the shape of a model from its directory, or from its ``config.json`` alone.

    Raises:
        UserError: there is no such file, or the model is not supported.
    """
    if path.is_dir() or path.suffix != ".json":
        return read_spec(path)
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"there is no file {path}: give a model directory or its config.json"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: give a model's config.json")
    return spec_from_config(content, str(path.parent))


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
        None if fitting else more_nodes(config, spec, machines, check),
    )


def _faster(config, spec, machines, check, fitting: list[Candidate]) -> Candidate | None:
    """Return the fastest layout that fits without activation checkpointing, if it is faster."""
    if not fitting or not config.parallel.activation_checkpointing or config.parallel.offload:
        return None
    parallel = dataclasses.replace(config.parallel, activation_checkpointing=False)
    without = dataclasses.replace(config, parallel=parallel)
    possible, _ = candidates(without, spec, machines, check)
    best = next((one for one in possible if one.fits), None)
    return best if best is not None and best.seconds < fitting[0].seconds else None


def layout_of(mesh: Mesh) -> RankLayout:
    """Return the layout of the ranks that were started."""
    return RankLayout(mesh.dp.size, mesh.cp.size, mesh.tp.size)


def machines_of(mesh: Mesh) -> Machines | None:
    """Return the GPUs that a run was started on; None on a CPU or for GPUs without known rates."""
    gpu = gpu_of(mesh.device)
    if gpu is None:
        return None
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world.size))
    return Machines(gpu, per_node, -(-mesh.world.size // per_node), 50e9)


def check_fits(config: Config, plan: Plan, mesh: Mesh) -> None:
    """Refuse a run that cannot fit into the memory of its GPUs, before weights are read.

    The run is refused if the estimate exceeds the GPU's memory by more than the estimate's error.

    Raises:
        UserError: on every rank, if the run cannot fit.
    """
    with checked_on_all_ranks(mesh.world):
        if mesh.device.type != "cuda":
            return
        capacity = torch.cuda.get_device_properties(mesh.device).total_memory
        refuse_if_too_large(config, plan.student, layout_of(mesh), capacity)


def refuse_if_too_large(
    config: Config, spec: ModelSpec, layout: RankLayout, capacity: float
) -> None:
    """Refuse a run whose estimate exceeds a GPU's memory by more than the estimate's error.

    Args:
        capacity: bytes of the GPU.

    Raises:
        UserError: the run cannot fit.
    """
    memory = memory_of(config, spec, layout)
    if memory.total * (1 - MEMORY_ERROR) <= capacity:
        return
    largest = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in memory.kinds.most_common(3))
    raise UserError(
        f"the run needs {memory.total / GIB:.1f} GiB per GPU (± {MEMORY_ERROR:.0%}; {largest}) and "
        f"the GPU has {capacity / GIB:.1f} GiB: megalard plan lists the layouts that fit and what "
        "each change saves"
    )


def comparison_lines(
    config: Config,
    plan: Plan,
    mesh: Mesh,
    measured: dict[str, int],
    peak: int | None,
    seconds: dict[str, float],
) -> Iterator[str]:
    """Yield the estimate and the measurement side by side.

    Args:
        measured: bytes of tensors of the last stage on one rank, by kind.
        peak: the largest allocation of a GPU; None on a CPU.
        seconds: stage to the measured time of a step.
    """
    layout = layout_of(mesh)
    machines = machines_of(mesh)
    memory = memory_of(config, plan.student, layout)
    yield f"{'estimate and measurement':<42}{'estimate':>12}{'measured':>12}"
    rows: list[tuple[str, str, str]] = []
    for kind, size in measured.items():
        rows.append((kind, _gib(memory.kinds[kind]), _gib(size)))
    if peak is not None:
        rows.append(("peak memory of a GPU", _gib(memory.total), _gib(peak)))
    if machines is not None:
        times = candidate(config, plan.student, layout, machines).times
        for name, time in times.items():
            rows.append(
                (f"step of stage {name}", f"{time.seconds:.3f} s", f"{seconds[name]:.3f} s")
            )
    for name, estimate, value in rows:
        yield f"  {name:<40}{estimate:>12}{value:>12}"
    if peak is None:
        yield "  on a CPU there is no GPU memory and no rate to compare"


def _gib(size: float) -> str:
    return f"{size / GIB:.3f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"
