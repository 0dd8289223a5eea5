"""The parts of a run together: built from a plan, resumed, saved, exported and reported."""

from __future__ import annotations

import math
from contextlib import ExitStack, closing
from functools import partial

from megalard.checkpoint.sharded.save_load import checkpoint_axis
from megalard.config.schema import Config
from megalard.kernels.relation_kl import describe_kernels
from megalard.parallel.mesh import Mesh, allowed_restarts
from megalard.reporter import Reporter
from megalard.training.build import load_models, make_loaders, open_streams
from megalard.training.evaluator import Evaluator
from megalard.training.export import save_student
from megalard.training.flops import peak_flops, step_flops
from megalard.training.holdout import split_holdout
from megalard.training.monitor import Monitor
from megalard.training.output import Output, emptied_on_error
from megalard.training.plan import Plan
from megalard.training.resume import describe_run, resume
from megalard.training.saver import Saver
from megalard.training.step import Distiller, StepResult
from megalard.training.stop_signals import StopSignals


class Run:
    """A run that is built and can be resumed and stepped.

    Attributes:
        config, plan, output, mesh: what the run was built from.
        teacher: None if nothing compares with it.
        distiller: the models, the objectives and the optimizer.
        loaders: the micro-batches of this rank.
        evaluator: what is measured before and after.
        reporter: prints on rank 0.
        steps_done: the number of steps taken before this start, after ``resume``.
        monitor, saver: what reports and saves the steps, after ``resume``.
    """

    monitor: Monitor
    saver: Saver

    def __init__(self, config: Config, plan: Plan, output: Output, mesh: Mesh):
        self.config, self.plan, self.output, self.mesh = config, plan, output, mesh
        self.reporter, self.steps_done = Reporter(mesh.is_rank_0), 0
        with ExitStack() as opened:
            with emptied_on_error(output, mesh):
                is_resumed = output.checkpoint is not None
                stores = open_streams(config, output.directory, plan, mesh, is_resumed=is_resumed)
                self._stores, held_out = split_holdout(stores, config, plan, output)
                self.loaders = opened.enter_context(make_loaders(config, self._stores, plan, mesh))
                self.evaluator = Evaluator(config, plan, output.directory, mesh, held_out)
                self.teacher, student = load_models(
                    config, plan, mesh, keep_teacher=self.evaluator.is_active
                )
            self.distiller = Distiller(self.teacher, student, config, mesh)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Close the loaders and the files of the monitor."""
        self._opened.close()

    def resume(self) -> None:
        """Restore the state of the newest checkpoint, if there is one; a collective call.

        Raises:
            UserError: on every rank, if the checkpoint, a model or the text is damaged or has
                changed.
        """
        config, plan, mesh = self.config, self.plan, self.mesh
        axis = checkpoint_axis(mesh)
        self.steps_done, origin_sections = resume(
            self.output, self.distiller, plan.origins, self._stores, axis, self.reporter
        )
        self.monitor = Monitor(
            self.output.directory,
            config.optimizer.steps,
            config.tokens_per_step,
            mesh.world.size,
            config.run.log_every,
            self.reporter,
            mesh.device,
            self.steps_done,
            self._ideal_seconds(),
        )
        self._opened.enter_context(closing(self.monitor))
        self.saver = Saver(
            self.output.checkpoints,
            self.distiller,
            plan.origins,
            partial(describe_run, self.distiller, plan.student_config, self._stores, self.loaders),
            plan.companions,
            config.checkpoint,
            axis,
            origin_sections,
            self.steps_done,
        )

    def _ideal_seconds(self) -> float | None:
        """Return the time of a step at the peak rate of the GPUs; None if that is not known."""
        peak = peak_flops(self.mesh.device)
        flops = step_flops(self.config, self.plan.student)
        return None if peak is None else flops / (peak * self.mesh.world.size)

    def steps_left(self) -> range:
        """Return the numbers of the steps that remain, counted from 1."""
        return range(self.steps_done + 1, self.config.optimizer.steps + 1)

    def step(self, number: int) -> StepResult:
        """Take step ``number``, counted from 1, and report it."""
        batches = self.loaders.step(number - 1, self.mesh.device)
        result = self.distiller.step(batches, number - 1)
        self.monitor.report(number, result)
        return result

    def save_and_export(self, number: int, stop: StopSignals) -> bool:
        """Save and export if that is due after step ``number``; return whether to stop here."""
        signal_name, has_failed = stop.agreed(self.mesh, self.saver.has_failed())
        if has_failed:
            self.saver.wait()
        if signal_name or self.saver.is_due(number):
            self.saver.save(number)
        if signal_name:
            self.saver.wait()
            self.reporter.line(f"{signal_name}: saved after step {number} and stopped")
            return True
        every, steps = self.config.checkpoint.export_every, self.config.optimizer.steps
        if every > 0 and number % every == 0 and number < steps:
            self._export(f"step-{number:06d}")
        return False

    def export_student(self, stop: StopSignals) -> bool:
        """Export the restored student; return whether a signal asks to stop here."""
        self._export("student")
        signal_name, _ = stop.agreed(self.mesh, False)
        if signal_name:
            self.saver.save(self.config.optimizer.steps)
            self.reporter.line(
                f"{signal_name}: the student is complete; the same command evaluates it"
            )
        return signal_name is not None

    def _export(self, name: str) -> None:
        plan, student = self.plan, self.distiller.student
        directory, weights = self.output.directory / name, plan.source.weights
        save_student(directory, student, weights, plan.student_config, plan.companions, self.mesh)

    def evaluate_before(self) -> None:
        """Measure the teacher and the scaled student."""
        self.evaluator.before(self.teacher, self.distiller.student.decoder)

    def evaluate_after(self) -> None:
        """Measure the restored student and report what was won."""
        tokens = self.config.tokens_per_step * self.config.optimizer.steps
        self.evaluator.after(self.teacher, self.distiller.student.decoder, tokens)

    def report_start(self) -> None:
        """Print what the run is about to do."""
        config, plan, mesh = self.config, self.plan, self.mesh
        spec, trained = plan.teacher.spec, self.distiller.student.trained
        layouts = self.distiller.student.decoder.layouts
        parameters = sum(math.prod(layouts[name].full_shape) for name in trained)
        steps, tokens = config.optimizer.steps, config.tokens_per_step
        rope = plan.student.rope["rope_type"]
        lines = [
            f"model     {spec.family}, {spec.num_layers} layers of {spec.hidden_size}: "
            f"{plan.teacher.directory}",
            f"window    {plan.native_window} -> {plan.student.max_positions} tokens (RoPE {rope})",
            f"ranks     {mesh.world.size} on {mesh.device.type}: dp {mesh.dp.size} x cp "
            f"{mesh.cp.size} x tp {mesh.tp.size}",
            f"kernels   {describe_kernels(mesh.device)}",
            f"trained   {parameters:,} parameters in {len(trained)} tensors "
            f"({config.trainable.mode})",
            f"text      {steps} steps of {tokens:,} tokens: {steps * tokens:,} tokens",
            f"output    {self.output.directory}",
        ]
        for line in lines:
            self.reporter.line(line)
        held_out = self.evaluator.settings.get("training_tokens_held_out")
        if held_out and self.evaluator.is_active:
            self.reporter.line(
                f"held out  {held_out:,} tokens of the training text, to measure on; "
                "evaluation.paths takes other text"
            )
        if allowed_restarts() and not config.checkpoint.save_every:
            self.reporter.warning(
                "checkpoint.save_every is 0, so a restart begins where this start began"
            )

    def report_end(self) -> None:
        """Print where the student is and what was won."""
        directory = self.output.directory / "student"
        self.reporter.line(f"restored model: {directory}")
        if not self.evaluator.is_active:
            self.reporter.line(
                "nothing was measured: give held-out text in evaluation.paths, or evaluate the "
                "model with megalard evaluate"
            )
            return
        entries, restoration = self.evaluator.entries, self.evaluator.restoration
        share = restoration.gap_restored(entries[-1], entries)
        gap = (
            "there was no short-text gap" if share is None else f"{share:.0%} of the short-text gap"
        )
        self.reporter.line(f"restored: {gap} on held-out text, with {entries[-1].tokens:,} tokens")
