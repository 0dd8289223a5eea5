"""The parts of a run together: built from a plan, resumed, saved, exported and reported."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path

import torch

from megalard.checkpoint.sharded.save_load import checkpoint_axis
from megalard.config.schema import Config, to_dict
from megalard.distill.student import Student
from megalard.errors import UserError
from megalard.estimate.flops import step_flops
from megalard.estimate.gpus import peak_flops
from megalard.model.decoder import Decoder
from megalard.parallel.agreement import checked_on_all_ranks, from_rank_0
from megalard.parallel.mesh import Mesh
from megalard.reporter import Reporter
from megalard.training.evaluator import Evaluator
from megalard.training.export import save_student
from megalard.training.holdout import split_holdout
from megalard.training.models import load_models, load_teacher, next_student, student_to_restore
from megalard.training.monitor import Monitor, Pace
from megalard.training.optimizer import continue_optimizer
from megalard.training.output import Output, check_is_there, emptied_on_error, mark_finished
from megalard.training.plan import Plan
from megalard.training.profiler import profiled
from megalard.training.resume import (
    Progress,
    describe_run,
    open_checkpoint,
    restore,
    restore_step,
)
from megalard.training.run_folder import checkpoint_path
from megalard.training.saver import Saver
from megalard.training.stages import MAIN, Stage, needs_teacher, stage_after, stages_of
from megalard.training.step import Distiller, StepResult
from megalard.training.stop_signals import StopSignals
from megalard.training.streams import make_loaders, open_streams
from megalard.training.summary import report_run, write_summary
from megalard.training.validator import Validator


class Run:
    """A run that is built and can be resumed and stepped, stage by stage.

    Attributes:
        config, plan, output, mesh: what the run was built from.
        stages: the stages, in order.
        teacher: None if no remaining stage compares the student with it.
        student: the student of the present stage.
        stage: the present stage.
        distiller: the models, the objectives and the optimizer of the present stage.
        evaluator: what is measured before, between and after the stages.
        validator: what is measured during the stages.
        reporter: prints on rank 0.
        steps_done: the number of steps taken, over all stages.
        steps_skipped: how many of them changed nothing.
        exported_step: the step whose student is exported as ``student``, after ``export_student``.
        monitor, saver: what reports and saves the steps, after ``resume``.
    """

    stage: Stage
    distiller: Distiller
    exported_step: int
    monitor: Monitor
    saver: Saver

    def __init__(self, config: Config, plan: Plan, output: Output, mesh: Mesh):
        self.config, self.plan, self.output, self.mesh = config, plan, output, mesh
        self.stages, self.steps_done, self.steps_skipped = stages_of(config), 0, 0
        self.reporter = Reporter(mesh.is_rank_0)
        is_resumed = output.checkpoint is not None
        self.teacher: Decoder | None
        self.student: Student
        with ExitStack() as opened:
            with emptied_on_error(output, mesh):
                stores = open_streams(
                    self.stages, output.directory, plan, mesh, is_resumed=is_resumed
                )
                self._stores, held_out = split_holdout(stores, self.stages, plan, output)
                self._loaders = {
                    stage.name: opened.enter_context(make_loaders(stage, self._stores, plan, mesh))
                    for stage in self.stages
                }
                self.evaluator = Evaluator(
                    config, plan, output.directory, mesh, held_out, is_resumed
                )
                # The student of an earlier stage is not what the run was asked for.
                first_step = self.stages[-1].steps_before + 1
                self.validator = Validator(config, self.evaluator, first_step)
                self.teacher, self.student = load_models(self.stages[0], plan, mesh)
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
        progress = open_checkpoint(self.output, plan, axis, self.reporter)
        self.steps_done, self.steps_skipped = progress.steps, progress.skipped
        if not self.validator.resume(progress.validations):
            self.reporter.warning(
                "the validations before this start read other text or lengths, so later ones are "
                "not compared with them"
            )
        number = stage_after(self.stages, self.steps_done)
        self.evaluator.resume([_after(stage) for stage in self.stages[:number]])
        self.student = student_to_restore(self.student, self.stages, number, plan, mesh)
        self._make_distiller(self.stages[number])
        origin_sections = restore(
            self.output,
            self.distiller,
            plan.origins,
            self.stages,
            self._stores,
            axis,
            self.reporter,
        )
        self.monitor = Monitor(
            self.output.directory,
            [self._pace(stage) for stage in self.stages],
            mesh.world.size,
            config.run.log_every,
            self.reporter,
            mesh.device,
            self.steps_done,
            peak_flops(mesh.device),
            config.run.trackers,
            to_dict(config),
        )
        self._opened.enter_context(closing(self.monitor))
        self.saver = Saver(
            self.output.checkpoints,
            config.steps,
            plan.origins,
            plan.companions,
            config.checkpoint,
            axis,
            origin_sections,
            self.steps_done,
        )
        self._save_stage(self.stages[number])
        self._note_validations()

    def stages_left(self) -> list[Stage]:
        """Return the stages that have steps left to take."""
        if self.stops_early():
            return []
        return [stage for stage in self.stages if stage.last_step > self.steps_done]

    def begin(self, stage: Stage) -> None:
        """End the previous stage and continue with its weights; a collective call."""
        if self.stage == stage:
            return
        self._end_stage()
        kept = self.distiller.optimizer if stage.keeps_optimizer else None
        if kept is None:
            # What the finished stage holds on the GPU is freed before the next stage is built.
            self.saver.end_stage()
            del self.distiller
        self.student = next_student(self.student, stage, self.plan, self.mesh)
        self._make_distiller(stage)
        if kept is not None:
            continue_optimizer(self.distiller.optimizer, kept)
        self._save_stage(stage)
        self.reporter.line(
            f"stage {stage.name}: {stage.config.optimizer.steps} steps of "
            f"{stage.config.tokens_per_step:,} tokens ({stage.config.trainable.mode})"
        )
        self.monitor.restart_clock(self.steps_done)

    def step(self, stage: Stage, number: int) -> StepResult:
        """Take step ``number``, counted from 1 over all stages, and report it."""
        place = number - 1 - stage.steps_before
        batches = self._loaders[stage.name].step(place, self.mesh.device)
        with self._profiled(number):
            result = self.distiller.step(batches, place)
        self.steps_done = number
        self.steps_skipped += result.skipped is not None
        self.monitor.report(number, result)
        return result

    def _profiled(self, number: int) -> AbstractContextManager:
        if number not in self.config.run.profile:
            return nullcontext()
        return profiled(self.output.directory, number, self.mesh, self.reporter)

    def validate(self, number: int) -> None:
        """Measure the student after step ``number`` if a validation is due; a collective call."""
        if self.validator.is_due(number):
            self.monitor.report_validation(self.validator.validate(self.student.decoder, number))
            self._note_validations()

    def stops_early(self) -> bool:
        """Whether the validations have stopped to improve, so that no further step is taken."""
        return self.validator.has_stopped_improving()

    def save_and_export(self, number: int, stop: StopSignals) -> bool:
        """Save and export if due after step ``number``; return whether the run stops here."""
        signal_name, has_failed = stop.agreed(self.mesh, self.saver.has_failed())
        if has_failed:
            self.saver.wait()
        is_best = number == self.saver.best_step
        if signal_name or is_best or self.stops_early() or self.saver.is_due(number):
            check_is_there(self.output, self.mesh)
            self.saver.save(number)
        if signal_name:
            self.saver.wait()
            self.student.complete()
            self.reporter.line(f"{signal_name}: saved after step {number} and stopped")
            return True
        self.export_if_due()
        return False

    def export_if_due(self) -> None:
        """Make the periodic export of the present step, unless it is there already.

        A run that died after a checkpoint and before its export makes the export when it resumes.
        """
        every, number = self.config.checkpoint.export_every, self.steps_done
        if every > 0 and 0 < number < self.config.steps and number % every == 0:
            name = f"step-{number:06d}"
            if not (self.output.directory / name).exists():
                self._export(name)

    def _end_stage(self) -> None:
        """Export and measure the student that a stage leaves; a collective call."""
        if self.stage.exports:
            self._export(f"stage-{self.stage.name}")
        self.evaluator.between(
            _after(self.stage),
            self.teacher,
            self.student.decoder,
            self._tokens_after(self.steps_done),
        )

    def export_student(self, stop: StopSignals) -> bool:
        """Export the restored student; return whether a signal asks to stop here.

        Raises:
            UserError: no step has changed the student.
        """
        if self.steps_skipped == self.steps_done:
            raise UserError(
                f"all {self.steps_done} steps were skipped, so the student is as it was: lower "
                "optimizer.learning_rate, set model.compute_dtype float32, or look at the text"
            )
        self.exported_step = self._return_to_best()
        self.student.complete()
        self._export("student")
        signal_name, _ = stop.agreed(self.mesh, False)
        if signal_name:
            self.saver.save(self.steps_done)
            self.reporter.line(
                f"{signal_name}: the student is complete; run the same command to evaluate it"
            )
        return signal_name is not None

    def evaluate_before(self) -> None:
        """Measure the teacher and the scaled student."""
        self.evaluator.before(self.teacher, self.student.decoder)
        self.validator.before(self.teacher, self.student.decoder)

    def evaluate_after(self) -> None:
        """Measure the restored student and report what was won."""
        if self.evaluator.is_active and self.teacher is None:
            self.teacher = load_teacher(self.config, self.plan, self.mesh)
        tokens = self._tokens_after(self.exported_step)
        self.evaluator.after(self.teacher, self.student.decoder, tokens)

    def summarize(self) -> None:
        """Write the summary and, if ``run.report`` asks for it, the report of the run."""
        facts = {
            "steps": self.config.steps,
            "last_step": self.steps_done,
            "early_stop": self.stops_early(),
            "exported_step": self.exported_step,
            "skipped": self.steps_skipped,
        }
        directory = self.output.directory
        with checked_on_all_ranks(self.mesh.world):
            if self.mesh.is_rank_0:
                write_summary(directory, self.plan, self.mesh, facts)
        if self.mesh.is_rank_0 and self.config.run.report:
            report_run(directory, self.monitor.board, self.steps_done, self.reporter)

    def finish(self) -> None:
        """Note that the run is complete, so that the same command does nothing more.

        This is a collective call: no rank ends while rank 0 still writes.
        """
        with checked_on_all_ranks(self.mesh.world):
            if self.mesh.is_rank_0:
                mark_finished(self.output, self.config)

    def _make_distiller(self, stage: Stage) -> None:
        if not needs_teacher(self.stages[self.stages.index(stage) :]):
            self.teacher = None  # its memory is free, except for weights that the student shares
        self.stage = stage
        self.distiller = Distiller(self.teacher, self.student, stage.config, self.mesh)

    def _save_stage(self, stage: Stage) -> None:
        self.saver.begin_stage(
            self.distiller,
            lambda step: describe_run(
                self.config,
                stage,
                self.distiller,
                self.plan.student_config,
                self._stores,
                self._loaders,
                self.stages,
                Progress(step, self.steps_skipped, self.validator.state()),
            ),
        )

    def _pace(self, stage: Stage) -> Pace:
        return Pace(
            None if stage.name == MAIN else stage.name,
            stage.last_step,
            stage.config.tokens_per_step,
            step_flops(stage.config, self.plan.student),
        )

    def _tokens_after(self, step: int) -> int:
        """Return the number of tokens of the steps 1 to ``step``."""
        return sum(
            (min(step, stage.last_step) - stage.steps_before) * stage.config.tokens_per_step
            for stage in self.stages
            if step > stage.steps_before
        )

    def _note_validations(self) -> None:
        """Let the monitor and the saver have the newest and the best validation."""
        best = self.validator.best
        self.monitor.validation = next(reversed(self.validator.results), None)
        self.saver.best_step = best.step if best and self.config.keeps_best else None

    def _return_to_best(self) -> int:
        """Restore the best student if it is to be exported; return the step of the student."""
        best, last = self.validator.best, self.steps_done
        if self.stops_early():
            since = "" if best is None else f" than step {best.step}"
            self.reporter.line(
                f"the run ends after step {last} of {self.config.steps}: "
                f"{self.config.evaluation.patience} validations in a row were not better{since} "
                "(evaluation.patience)"
            )
        if best is None or not self.config.keeps_best:
            return last
        if best.step != last:
            path = checkpoint_path(self.output.checkpoints, best.step)
            if not from_rank_0(path.is_dir(), self.mesh.world):
                self.reporter.warning(f"{path} was removed, so the last student is exported")
                return last
            self.saver.save(last)
            self.saver.wait()
            restore_step(self.distiller, path, checkpoint_axis(self.mesh))
        self.reporter.line(
            f"the student of step {best.step} is exported, whose validation is the best: "
            f"{self.validator.describe(best)}"
        )
        return best.step

    def _export(self, name: str) -> None:
        plan, directory = self.plan, Path(self.output.directory / name)
        check_is_there(self.output, self.mesh)
        chosen = self.config.checkpoint.export_dtype
        loss = save_student(
            directory,
            self.student,
            plan.source.weights,
            plan.student_config,
            plan.companions,
            self.mesh,
            None if chosen == "source" else getattr(torch, chosen),
            self.config.checkpoint.export_rounding == "stochastic",
        )
        if loss.lost and self.config.checkpoint.export_rounding == "nearest":
            self.reporter.line(
                f"{directory}: rounding took {loss.share:.1%} of the {loss.changed:,} changed "
                "weights back to what they were; checkpoint.export_rounding stochastic keeps them "
                "in the mean, and checkpoint.export_dtype float32 exactly"
            )


def _after(stage: Stage) -> str:
    """Return the name that the tables of an evaluation give the student after a stage."""
    return f"after {stage.name}"
