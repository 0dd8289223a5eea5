"""One run of the study: a method restores a scaled student, which is measured several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from megalard.errors import UserError
from megalard.evaluation.measure import Measurement
from megalard.evaluation.suite import Results, Suite, run_suite
from megalard.model.decoder import Decoder
from tools.study.description import WARM_UP_STEPS, Run
from tools.study.folder import Study
from tools.study.lengths import EDGES, NATIVE_WINDOW, SHORT_LENGTHS, STUDENT_WINDOW
from tools.study.methods import METHODS
from tools.study.training import Training


class Models:
    """The models of a run, and their measurements.

    Args:
        study: the text and the samples.
        training: has the teacher and the student.
        measures_teacher: whether the teacher is measured in place of the student.
    """

    def __init__(self, study: Study, training: Training, measures_teacher: bool):
        self.study, self._training, self._measures_teacher = study, training, measures_teacher

    @property
    def model(self) -> Decoder:
        """The model that is measured."""
        training = self._training
        return training.teacher if self._measures_teacher else training.model

    def by_length(
        self, domains: Sequence[str], split: str, lengths: Sequence[int], tokens: int
    ) -> dict[str, dict]:
        """Return the means over the text of each domain, by length, as JSON takes them."""
        results = {}
        for domain in domains:
            suite = Suite(self.study.windows(domain, split, lengths, tokens))
            results[domain] = _as_json(self._run(suite).by_length)
        return results

    def all_measurements(self) -> dict:
        """Return all that methods are compared by: short text, long text and tasks."""
        study, domains = self.study, {}
        for domain in study.domains:
            text = study.windows(domain, "test", SHORT_LENGTHS, study.sizes.short)
            short = self._run(Suite(text))
            text = study.windows(domain, "test", (STUDENT_WINDOW,), study.sizes.long)
            long = run_suite(self.model, Suite(text), study.mesh, self._training.dtype, edges=EDGES)
            domains[domain] = {
                **_as_json(short.by_length),
                **_as_json(long.by_length),
                "by_position": [asdict(measurement) for measurement in long.by_position],
            }
        tasks = run_suite(self.model, study.tasks, study.mesh, self._training.dtype).tasks
        return {
            "domains": domains,
            "tasks": {
                task: {str(length): asdict(result) for length, result in by_length.items()}
                for task, by_length in tasks.items()
            },
        }

    def milestone(self, tokens: int) -> dict:
        """Return a point of a curve: short text after ``tokens`` training tokens."""
        study = self.study
        domains = self.by_length(study.domains, "test", SHORT_LENGTHS, study.sizes.milestone)
        return {"tokens": tokens, "domains": domains}

    def _run(self, suite: Suite) -> Results:
        training = self._training
        return run_suite(
            self.model, suite, training.mesh, training.dtype, training.teacher, NATIVE_WINDOW
        )


def execute(study: Study, run: Run) -> dict:
    """Train and measure; return the result as JSON takes it.

    Raises:
        UserError: the teacher or the corpus does not fit the study.
    """
    per_step = study.config(run).tokens_per_step
    steps = run.tokens(study.shrink, per_step) // per_step
    # A timed run does without a teacher that its method does not need, for the sake of its memory.
    keeps_teacher = run.kind != "timing"
    config = study.config(run, max(1, steps))
    training = Training(config, study.folder, study.mesh, keeps_teacher)
    if training.plan.native_window != NATIVE_WINDOW:
        raise UserError(
            f"the teacher {training.plan.teacher.directory} reads {training.plan.native_window} "
            f"positions, and the study is laid out for {NATIVE_WINDOW}: pretrain another teacher"
        )
    models = Models(study, training, measures_teacher=run.method == "teacher")
    result: dict = {**asdict(run), "key": run.key, "tokens_per_step": per_step, "curve": []}
    if steps:
        result |= _train(study, run, models, training, per_step)
    if run.kind == "search":
        lengths = (*SHORT_LENGTHS, STUDENT_WINDOW)
        text = ([study.domain], "validation", lengths, study.sizes.validation)
        result["validation"] = models.by_length(*text)
    elif run.kind == "baseline":
        result |= {"curve": [models.milestone(0)], "compared": models.all_measurements()}
    return result


def _train(study: Study, run: Run, models: Models, training: Training, per_step: int) -> dict:
    """Take all steps, and measure after those that complete a milestone."""
    milestones: dict[int, int] = {}
    if run.kind == "final":
        # Rounded down: no method is measured after more tokens than its milestone says.
        marks = METHODS[run.method].milestones()
        milestones = {int(tokens / study.shrink / per_step): tokens for tokens in marks}
    times: list[float] = []
    result: dict = {"curve": []}
    for number, (tokens, step, seconds) in enumerate(training.steps()):
        times.append(seconds)
        result |= {"loss": step.loss, "parts": step.parts}
        if number + 1 in milestones:
            result["curve"].append(models.milestone(tokens))
            if milestones[number + 1] == METHODS[run.method].compared_at:
                result["compared"] = models.all_measurements()
    return result | {
        "seconds_per_step": float(np.median(times[WARM_UP_STEPS:] or times)),
        "peak_memory": training.peak_memory(),
    }


def _as_json(by_length: dict[int, Measurement]) -> dict[str, dict]:
    return {str(length): asdict(measurement) for length, measurement in by_length.items()}
