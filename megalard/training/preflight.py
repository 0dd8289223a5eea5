"""Preflight: two real steps of each stage and a report, before a long run is paid for."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megalard.config.schema import Config
from megalard.data.loader import StreamLoaders
from megalard.errors import UserError
from megalard.kernels.relation_kl import describe_kernels
from megalard.model.decoder import Decoder
from megalard.model.rope import RopeTable
from megalard.parallel.agreement import gather_objects
from megalard.parallel.mesh import Mesh
from megalard.training.estimated import Measured, comparison_lines, state_bytes
from megalard.training.models import load_models, next_student
from megalard.training.monitor import peak_memory_bytes
from megalard.training.plan import Plan
from megalard.training.stages import needs_teacher, stages_of
from megalard.training.step import Distiller
from megalard.training.streams import make_loaders, open_streams

_STEPS = 2
_ROPE_ROWS = 8


def run_preflight(config: Config, plan: Plan, scratch: Path, mesh: Mesh) -> None:
    """Take two real steps of each stage, check the losses and gradients, and report.

    The report has the estimate of memory and time next to what was measured.

    Args:
        scratch: a directory for the tokens, which the caller removes.

    Raises:
        UserError: a loss or a gradient is not finite, or the gradient of a trained tensor is zero
            on every rank after the second step of its stage. In the first step the gradient of
            LoRA's A is zero, because B is zero.
    """
    stages = stages_of(config)
    stores = open_streams(stages, scratch, plan, mesh, read_only=True)
    first_teacher, student = load_models(stages[0], plan, mesh)
    teacher: Decoder | None = first_teacher
    rope, console = first_teacher.rope, Console(width=120)
    del first_teacher
    total_minutes, memory = 0.0, 0
    step_seconds: dict[str, float] = {}
    distiller: Distiller | None = None
    for number, stage in enumerate(stages):
        teacher = teacher if needs_teacher(stages[number:]) else None
        if number:
            distiller = None  # its memory is free for the next stage
            student = next_student(student, stage, plan, mesh)
        with make_loaders(stage, stores, plan, mesh) as loaders:
            distiller = Distiller(teacher, student, stage.config, mesh)
            seconds, losses = _two_steps(distiller, loaders)
        step_seconds[stage.name] = seconds[-1]
        memory = max(memory, *gather_objects(peak_memory_bytes(mesh.device), mesh.world))
        if mesh.is_rank_0:
            if len(stages) > 1:
                console.print(f"stage {stage.name}")
            total_minutes += _print_stage(console, distiller, seconds, losses)
    student.complete()  # No weights are on their way when the ranks end.
    if mesh.is_rank_0:
        _print_rope(console, rope, student.decoder.rope, plan)
        if len(stages) > 1:
            console.print(f"all stages: {total_minutes:.1f} minutes")
        console.print(
            f"relation kernels: {describe_kernels(mesh.device)}\n"
            f"ranks: dp {mesh.dp.size} x cp {mesh.cp.size} x tp {mesh.tp.size} on "
            f"{mesh.device.type}\n"
            f"peak memory: {memory / 2**30:.2f} GiB on the rank that uses most"
        )
        is_gpu = mesh.device.type == "cuda"
        measured = Measured(state_bytes(distiller), memory if is_gpu else None, step_seconds)
        for line in comparison_lines(config, plan.student, mesh, measured):
            console.print(line, highlight=False)
        console.print("preflight passed; nothing was written")


def _two_steps(distiller: Distiller, loaders: StreamLoaders) -> tuple[list[float], list[float]]:
    """Take the steps and check them; return their seconds and their losses."""
    seconds, losses = [], []
    for number in range(_STEPS):
        batches = loaders.step(number, distiller.mesh.device)
        start = time.perf_counter()
        result = distiller.step(batches, number)
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss)
        if not math.isfinite(result.loss) or not math.isfinite(result.gradient_norm):
            raise UserError(
                f"preflight step {number + 1}: loss {result.loss} and gradient norm "
                f"{result.gradient_norm} are not both finite: lower optimizer.learning_rate, or "
                "set model.compute_dtype float32"
            )
    _check_gradients(distiller)
    return seconds, losses


def _print_stage(
    console: Console, distiller: Distiller, seconds: list[float], losses: list[float]
) -> float:
    """Print what two steps of a stage showed; return the minutes of the whole stage."""
    config, trained = distiller.config, distiller.student.trained
    slices = distiller.student.decoder.slices
    total = sum(math.prod(slices[name].full_shape) for name in trained)
    console.print(f"trained: {total:,} parameters in {len(trained)} tensors")
    for kind, count, shape in _kinds(distiller):
        console.print(f"  {count:4d} x {kind} {list(shape)}")
    tokens, steps = config.tokens_per_step, config.optimizer.steps
    minutes = seconds[-1] * steps / 60
    console.print(
        f"loss: {' -> '.join(f'{loss:.5f}' for loss in losses)}\n"
        f"gradients: finite and not zero for all {len(trained)} trained tensors\n"
        f"time: {seconds[-1]:.2f} s per step of {tokens:,} tokens "
        f"({tokens / seconds[-1]:,.0f} tokens/s), {minutes:.1f} minutes for {steps} steps "
        f"({tokens * steps:,} tokens)"
    )
    return minutes


def _check_gradients(distiller: Distiller) -> None:
    not_finite, not_zero = [], set()
    for name, gradient in distiller.masters.local_gradients():
        if not torch.isfinite(gradient).all():
            not_finite.append(name)
        elif gradient.any():
            not_zero.add(name)
    world = distiller.mesh.world
    not_finite = sorted({name for names in gather_objects(not_finite, world) for name in names})
    if not_finite:
        raise UserError(
            f"preflight: the gradient of {not_finite[0]} is not finite ({len(not_finite)} such "
            "tensors): lower optimizer.learning_rate, or set model.compute_dtype float32"
        )
    not_zero = set().union(*gather_objects(not_zero, world))
    zero = [name for name in distiller.student.trained if name not in not_zero]
    if zero:
        raise UserError(
            f"preflight: the gradient of {zero[0]} is all zero after {_STEPS} steps ({len(zero)} "
            "such tensors): the loss does not depend on what is to be trained; choose other terms "
            "or other weights"
        )


def _print_rope(console: Console, teacher: RopeTable, student: RopeTable, plan: Plan) -> None:
    """Print the frequencies of at most _ROPE_ROWS pairs before and after scaling."""
    table = Table(title=f"RoPE: window {plan.native_window} -> {plan.student.max_positions}")
    for heading in ("pair", "teacher 1/frequency", "student 1/frequency", "ratio"):
        table.add_column(heading, justify="right")
    pairs = len(teacher.inv_freq)
    shown = (
        range(pairs)
        if pairs <= _ROPE_ROWS
        else [round(row * (pairs - 1) / (_ROPE_ROWS - 1)) for row in range(_ROPE_ROWS)]
    )
    for pair in shown:
        t, s = float(teacher.inv_freq[pair]), float(student.inv_freq[pair])
        table.add_row(str(pair), f"{1 / t:.6g}", f"{1 / s:.6g}", f"{t / s:.4f}")
    console.print(table)
    console.print(
        f"cos/sin factor: teacher {teacher.attention_scaling:.4f}, "
        f"student {student.attention_scaling:.4f} ({plan.student.rope['rope_type']})"
    )


def _kinds(distiller: Distiller):
    slices = distiller.student.decoder.slices
    counts: dict[tuple, int] = {}
    for name in distiller.student.trained:
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        key = (kind, slices[name].full_shape)
        counts[key] = counts.get(key, 0) + 1
    return [(kind, count, shape) for (kind, shape), count in counts.items()]
