"""``--preflight``: two real steps and a report, before a long run is paid for."""

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
from megalard.training.assemble import Plan
from megalard.training.monitor import peak_memory_bytes
from megalard.training.step import Distiller

_STEPS = 2


def preflight(distiller: Distiller, plan: Plan, loaders: StreamLoaders) -> None:
    """Check loss and every trained tensor's gradient on real steps, and report.

    Raises:
        UserError: a loss or gradient is not finite, or a trained tensor's gradient is all zero on
            every rank after the second step (in the first, LoRA's A has none, since B is zero).
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
    if mesh.world.rank != 0:
        return

    console = Console(width=120)
    _print_rope(console, distiller, plan)
    trained = distiller.student.trained
    layouts = distiller.student.decoder.layouts
    total = sum(math.prod(layouts[name].full_shape) for name in trained)
    console.print(f"trained: {total:,} parameters in {len(trained)} tensors")
    for kind, count, shape in _kinds(distiller):
        console.print(f"  {count:4d} x {kind} {list(shape)}")
    tokens = config.tokens_a_step
    steps = config.optimizer.steps
    console.print(
        f"relation kernels: {describe_kernels(mesh.device)}\n"
        f"ranks: dp {mesh.dp.size} x cp {mesh.cp.size} x tp {mesh.tp.size} on {mesh.device.type}\n"
        f"loss: {' -> '.join(f'{loss:.5f}' for loss in losses)}\n"
        f"gradients: all {len(trained)} trained tensors finite and not zero\n"
        f"peak memory: {memory / 2**30:.2f} GiB on the fullest rank\n"
        f"time: {seconds[-1]:.2f} s a step of {tokens:,} tokens "
        f"({tokens / seconds[-1]:,.0f} tokens/s), {seconds[-1] * steps / 60:.1f} minutes for "
        f"{steps} steps ({tokens * steps:,} tokens)\n"
        "preflight passed; nothing was written"
    )


def _check_gradients(distiller: Distiller) -> None:
    bad, alive = [], set()
    for name, parameter in distiller.student.trained.items():
        if not torch.isfinite(parameter.grad).all():
            bad.append(name)
        elif parameter.grad.any():
            alive.add(name)
    world = distiller.mesh.world
    bad = sorted({name for names in gather_objects(bad, world) for name in names})
    if bad:
        raise UserError(
            f"preflight: the gradient of {bad[0]} is not finite ({len(bad)} such tensors)"
        )
    alive = set().union(*gather_objects(alive, world))
    dead = [name for name in distiller.student.trained if name not in alive]
    if dead:
        raise UserError(
            f"preflight: the gradient of {dead[0]} is all zero after {_STEPS} steps ({len(dead)} "
            "such tensors): the loss does not reach what is to be trained"
        )


def _print_rope(console: Console, distiller: Distiller, plan: Plan) -> None:
    teacher, student = rope_table(plan.teacher), distiller.student.decoder.rope
    table = Table(title=f"RoPE: window {plan.native_context} -> {plan.student.max_positions}")
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
