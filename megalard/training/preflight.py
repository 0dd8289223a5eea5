"""Preflight: two real steps and a report, before a long run is paid for."""

from __future__ import annotations

import math
import time

import torch
from rich.console import Console
from rich.table import Table

from megalard.data.loader import StreamLoaders
from megalard.errors import UserError
from megalard.kernels.relation_kl import describe_kernels
from megalard.model.rope import rope_table
from megalard.parallel.agreement import gather_objects
from megalard.training.monitor import peak_memory_bytes
from megalard.training.plan import Plan
from megalard.training.step import Distiller

_STEPS = 2


def run_preflight(distiller: Distiller, plan: Plan, loaders: StreamLoaders) -> None:
    """Take two real steps, check the loss and the gradient of every trained tensor, and report.

    Raises:
        UserError: a loss or a gradient is not finite, or the gradient of a trained tensor is zero
            on every rank after the second step. In the first step the gradient of LoRA's A is zero,
            because B is zero.
    """
    mesh, config = distiller.mesh, distiller.config
    seconds, losses = [], []
    for number in range(_STEPS):
        batches = loaders.step(number, mesh.device)
        start = time.perf_counter()
        result = distiller.step(batches, number)
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss)
        if not math.isfinite(result.loss) or not math.isfinite(result.gradient_norm):
            raise UserError(f"preflight step {number + 1}: loss {result.loss} is not finite")
    _check_gradients(distiller)
    memory = max(gather_objects(peak_memory_bytes(mesh.device), mesh.world))
    if not mesh.is_rank_0:
        return

    console = Console(width=120)
    _print_rope(console, distiller, plan)
    trained = distiller.student.trained
    layouts = distiller.student.decoder.layouts
    total = sum(math.prod(layouts[name].full_shape) for name in trained)
    console.print(f"trained: {total:,} parameters in {len(trained)} tensors")
    for kind, count, shape in _kinds(distiller):
        console.print(f"  {count:4d} x {kind} {list(shape)}")
    tokens = config.tokens_per_step
    steps = config.optimizer.steps
    console.print(
        f"relation kernels: {describe_kernels(mesh.device)}\n"
        f"ranks: dp {mesh.dp.size} x cp {mesh.cp.size} x tp {mesh.tp.size} on {mesh.device.type}\n"
        f"loss: {' -> '.join(f'{loss:.5f}' for loss in losses)}\n"
        f"gradients: finite and not zero for all {len(trained)} trained tensors\n"
        f"peak memory: {memory / 2**30:.2f} GiB on the rank that uses most\n"
        f"time: {seconds[-1]:.2f} s per step of {tokens:,} tokens "
        f"({tokens / seconds[-1]:,.0f} tokens/s), {seconds[-1] * steps / 60:.1f} minutes for "
        f"{steps} steps ({tokens * steps:,} tokens)\n"
        "preflight passed; nothing was written"
    )


def _check_gradients(distiller: Distiller) -> None:
    not_finite, not_zero = [], set()
    for name, parameter in distiller.student.trained.items():
        if not torch.isfinite(parameter.grad).all():
            not_finite.append(name)
        elif parameter.grad.any():
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


def _print_rope(console: Console, distiller: Distiller, plan: Plan) -> None:
    teacher, student = rope_table(plan.teacher.spec), distiller.student.decoder.rope
    table = Table(title=f"RoPE: window {plan.native_window} -> {plan.student.max_positions}")
    for heading in ("pair", "teacher 1/frequency", "student 1/frequency", "ratio"):
        table.add_column(heading, justify="right")
    for pair, (t, s) in enumerate(
        zip(teacher.inv_freq.tolist(), student.inv_freq.tolist(), strict=True)
    ):
        table.add_row(str(pair), f"{1 / t:.6g}", f"{1 / s:.6g}", f"{t / s:.4f}")
    console.print(table)
    console.print(
        f"cos/sin factor: teacher {teacher.attention_scaling:.4f}, "
        f"student {student.attention_scaling:.4f} ({plan.student.rope['rope_type']})"
    )


def _kinds(distiller: Distiller):
    layouts = distiller.student.decoder.layouts
    counts: dict[tuple, int] = {}
    for name in distiller.student.trained:
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        key = (kind, layouts[name].full_shape)
        counts[key] = counts.get(key, 0) + 1
    return [(kind, count, shape) for (kind, shape), count in counts.items()]
