"""One run of the study: a pre-trained model is restored by one method, and measured."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import numpy as np

from megalard.evaluation.suite import Suite, run_suite
from tools.study.pretrained.choices import right_answers
from tools.study.pretrained.folder import Study
from tools.study.pretrained.methods import METHODS
from tools.study.training import Training


@dataclass(frozen=True)
class Run:
    """The description of one run.

    Attributes:
        kind: ``search`` tries a learning rate, ``final`` is compared, and ``baseline`` trains
            nothing.
        method: a name in ``METHODS``; for a baseline ``teacher`` or ``scaled``.
        rope: ``rope.type`` of the student.
        factor: the student's window is this times the teacher's.
        tokens: the number of training tokens.
        rates: the learning rate of each stage.
        seed: the seed of the run.
    """

    kind: str
    method: str
    rope: str
    factor: int
    tokens: int = 0
    rates: tuple[float, ...] = ()
    seed: int = 0

    @property
    def key(self) -> str:
        """The name of the run in the file of results."""
        rates = ",".join(f"{rate:g}" for rate in self.rates)
        parts = (self.kind, self.method, self.rope, self.factor, self.tokens, rates, self.seed)
        return "/".join(map(str, parts))

    @property
    def order(self) -> tuple:
        """A key that sorts runs by seed, and the longest runs of a seed first."""
        return self.seed, -self.tokens


def execute(study: Study, run: Run) -> dict:
    """Train and measure; return the result as JSON takes it.

    Raises:
        UserError: the teacher or the corpus does not fit the study.
    """
    stages = METHODS[run.method].stages if run.rates else ("linearard",)
    rates = run.rates or (1e-3,)
    config = study.config(stages, rates, run.rope, run.factor, max(1, run.tokens), run.seed)
    training = Training(config, study.folder, study.mesh)
    result: dict = {**asdict(run), "key": run.key}
    times: list[float] = []
    if run.rates:
        start = time.perf_counter()
        for tokens, step, seconds in training.steps():
            times.append(seconds)
            result |= {"tokens_read": tokens, "loss": step.loss}
        result["training_seconds"] = time.perf_counter() - start
        result["peak_memory"] = training.peak_memory()
        result["seconds_per_step"] = float(np.median(times))
    if run.kind == "search":
        result["validation"] = measure_text(study, training, run, "validation")
    else:
        result["measured"] = {
            "text": measure_text(study, training, run, "test"),
            "choices": measure_choices(study, training, run),
            "tasks": measure_tasks(study, training, run),
        }
    return result


def measure_text(study: Study, training: Training, run: Run, split: str) -> dict:
    """Return loss, KL to the teacher, agreement and accuracy per domain and length.

    The longest windows are measured by position too.
    """
    model, edges = _model(training, run), study.edges(run.factor)
    sizes, results = study.sizes, {}
    short_tokens = sizes.validation if split == "validation" else sizes.short
    long_tokens = max(edges[-1], sizes.validation) if split == "validation" else sizes.long
    for domain in study.domains:
        windows = study.windows(domain, split, study.short_lengths, short_tokens)
        short = run_suite(
            model,
            Suite(windows),
            study.mesh,
            training.dtype,
            training.teacher,
            study.native_window,
        )
        windows = study.windows(domain, split, (edges[-1],), long_tokens)
        long = run_suite(model, Suite(windows), study.mesh, training.dtype, edges=edges)
        results[domain] = {
            **{str(length): asdict(m) for length, m in (short.by_length | long.by_length).items()},
            "by_position": [m.loss for m in long.by_position],
        }
    return results


def measure_choices(study: Study, training: Training, run: Run) -> dict:
    """Return for each task which questions are answered right, as a text of 0 and 1."""
    results = {}
    for task, (questions, rows) in study.choices.items():
        right = right_answers(_model(training, run), questions, rows, study.mesh, training.dtype)
        results[task] = "".join("01"[answer] for answer in right)
    return results


def measure_tasks(study: Study, training: Training, run: Run) -> dict:
    """Return the share of exact answers, and their loss, per retrieval task and length."""
    suite = study.retrieval(run.factor)
    tasks = run_suite(_model(training, run), suite, study.mesh, training.dtype).tasks
    return {
        task: {str(length): asdict(result) for length, result in by_length.items()}
        for task, by_length in tasks.items()
    }


def validation_loss(result: dict, is_long: bool, short_lengths: tuple[int, ...]) -> float:
    """Return the mean validation loss over all domains; infinity for a run that diverged.

    Args:
        is_long: whether the windows of the student's length count as much as all short ones.
    """
    losses = []
    for by_length in result["validation"].values():
        short = [by_length[str(length)]["loss"] for length in short_lengths]
        longest = max(int(length) for length in by_length if length.isdigit())
        values = [sum(short) / len(short)]
        values += [by_length[str(longest)]["loss"]] if is_long else []
        losses.append(sum(values) / len(values))
    mean = sum(losses) / len(losses)
    return math.inf if math.isnan(mean) else mean


def _model(training: Training, run: Run):
    return training.teacher if run.method == "teacher" else training.model
