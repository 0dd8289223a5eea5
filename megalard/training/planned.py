"""Plan a run by estimates: before it exists, and on the ranks that it was started with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from megalard.config.schema import Config
from megalard.errors import UserError
from megalard.estimate.gpus import GIB, Machines, gpu_of
from megalard.estimate.layouts import Candidate, Check, candidates, more_nodes, remedies
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
from megalard.estimate.report import PlanResult
from megalard.estimate.time import run_times
from megalard.files.reading import read_json
from megalard.model.rope import scaled_config, window_of
from megalard.model.spec import ModelSpec, read_spec, spec_from_config
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.mesh import Mesh
from megalard.parallel.tensor.layout import check_divisible
from megalard.training.plan import check_stream, naming_stream
from megalard.training.step import Distiller


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


def check_fits(config: Config, spec: ModelSpec, mesh: Mesh) -> None:
    """Refuse a run that cannot fit into the memory of its GPUs, before weights are read.

    On a CPU nothing is refused.

    Raises:
        UserError: on every rank, if the run cannot fit on one of them.
    """
    with checked_on_all_ranks(mesh.world):
        if mesh.device.type == "cuda":
            capacity = torch.cuda.get_device_properties(mesh.device).total_memory
            refuse_if_too_large(memory_of(config, spec, layout_of(mesh)), capacity)


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
    """Return the bytes of weights, masters, moments and gradients that a rank has."""
    teacher = [] if distiller.teacher is None else list(distiller.teacher.parameters())
    trained = list(distiller.student.trained.values())
    others = {id(parameter) for parameter in (*teacher, *trained)}
    alone = [x for x in distiller.student.decoder.parameters() if id(x) not in others]
    moments = [
        value
        for state in distiller.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.ndim
    ]
    return {
        TEACHER: _bytes(teacher),
        STUDENT: _bytes(alone),
        MASTERS: _bytes(trained),
        MOMENTS: _bytes(moments),
        GRADIENTS: _bytes([distiller.gradients.flat]),
    }


def comparison_lines(
    config: Config, spec: ModelSpec, mesh: Mesh, measured: Measured
) -> Iterator[str]:
    """Yield the estimate and the measurement side by side."""
    layout, machines = layout_of(mesh), machines_of(mesh)
    last = stage_memory(config, len(config.all_stages()) - 1, spec, layout)
    rows = [(kind, size_text(last.kinds[kind]), size_text(x)) for kind, x in measured.state.items()]
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


def size_text(size: float) -> str:
    """Return a number of bytes in GiB or, if it is small, in KiB."""
    return f"{size / GIB:.3f} GiB" if size >= GIB / 100 else f"{size / 2**10:.1f} KiB"


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
