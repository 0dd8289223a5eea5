"""What a run prints at its start and at its end."""

from __future__ import annotations

import math

from megalard.kernels.relation_kl import describe_kernels
from megalard.parallel.mesh import Mesh, allowed_restarts
from megalard.reporter import Reporter
from megalard.training.output import Output
from megalard.training.run import Run


def report_start(run: Run) -> None:
    """Print what a run is about to do."""
    config, plan, mesh = run.config, run.plan, run.mesh
    spec, slices = plan.teacher.spec, run.student.decoder.slices
    parameters = sum(math.prod(slices[name].full_shape) for name in run.student.trained)
    first = run.stages[0].config
    lines = [
        f"model     {spec.family}, {spec.num_layers} layers of {spec.hidden_size}: "
        f"{plan.teacher.directory}",
        f"window    {plan.native_window} -> {plan.student.max_positions} tokens (RoPE "
        f"{plan.student.rope['rope_type']})",
        f"ranks     {mesh.world.size} on {mesh.device.type}: dp {mesh.dp.size} x cp "
        f"{mesh.cp.size} x tp {mesh.tp.size}",
        f"kernels   {describe_kernels(mesh.device)}",
        f"trained   {parameters:,} parameters in {len(run.student.trained)} tensors "
        f"({first.trainable.mode})",
    ]
    for stage in run.stages:
        steps, tokens = stage.config.optimizer.steps, stage.config.tokens_per_step
        name = "text" if len(run.stages) == 1 else stage.name
        lines.append(f"{name:<9} {steps} steps of {tokens:,} tokens: {steps * tokens:,} tokens")
    lines.append(f"output    {run.output.directory}")
    for line in lines:
        run.reporter.line(line)
    held_out = run.evaluator.settings.get("training_tokens_held_out")
    if held_out and run.evaluator.is_active:
        run.reporter.line(
            f"held out  {held_out:,} tokens of the training text, to measure on; "
            "evaluation.paths takes other text"
        )
    if allowed_restarts() and not config.checkpoint.save_every:
        run.reporter.warning(
            "checkpoint.save_every is 0, so a restart begins where this start began"
        )


def report_finished(output: Output, mesh: Mesh) -> None:
    """Print that the run has finished already."""
    Reporter(mesh.is_rank_0).line(
        f"the run in {output.directory} has finished: the restored model is in "
        f"{output.directory / 'student'}; nothing was changed"
    )


def report_end(run: Run) -> None:
    """Print where the student is and what was won."""
    run.reporter.line(f"restored model: {run.output.directory / 'student'}")
    if run.steps_skipped:
        run.reporter.warning(f"{run.steps_skipped} of {run.steps_done} steps were skipped")
    if not run.evaluator.is_active:
        run.reporter.line(
            "nothing was measured: give held-out text in evaluation.paths, or evaluate the model "
            "with megalard evaluate"
        )
        return
    entries, restoration = run.evaluator.entries, run.evaluator.restoration
    share = restoration.gap_restored(entries[-1], entries)
    gap = "there was no short-text gap"
    if share is not None:
        # The sum has no sign where the share rounds to zero.
        gap = f"{round(share, 2) + 0.0:.0%} of the short-text gap"
    run.reporter.line(f"restored: {gap} on held-out text, with {entries[-1].tokens:,} tokens")
