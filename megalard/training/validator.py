"""Validation during a run: the student on a bounded part of the held-out text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

from megalard.config.schema import Config
from megalard.errors import UserError
from megalard.evaluation.measure import RecordedTeacher, measure, measure_and_record
from megalard.evaluation.report import Entry, finite
from megalard.evaluation.suite import Results
from megalard.model.decoder import Decoder
from megalard.parallel.agreement import from_rank_0
from megalard.training.evaluator import Evaluator


@dataclass(frozen=True)
class Validation:
    """The student after some step.

    Attributes:
        step: the number of the step, counted from 1 over all stages.
        loss: the mean cross-entropy by length, in nats.
        gap_restored: as ``Restoration.gap_restored``; None if there is no gap, or no length up to
            the native window.
        kl, agreement: the means over the lengths up to the native window; None without any.
    """

    step: int
    loss: Mapping[int, float]
    gap_restored: float | None
    kl: float | None
    agreement: float | None

    def values(self) -> dict[str, float]:
        """Return the numbers that were measured, by the names of metrics.jsonl."""
        means = {
            "gap_restored": self.gap_restored,
            "kl": self.kl,
            "agreement": self.agreement,
            **{f"loss_{length}": loss for length, loss in self.loss.items()},
        }
        return {f"validation_{k}": value for k, value in means.items() if value is not None}

    def line(self) -> str:
        """Return the numbers in words."""
        parts = []
        if self.gap_restored is not None:
            parts.append(f"gap restored {self.gap_restored:.3f}")
        if self.kl is not None:
            parts.append(f"KL to teacher {self.kl:.4f}  same top-1 {self.agreement:.3f}")
        losses = " ".join(f"{length}: {loss:.4f}" for length, loss in self.loss.items())
        return "  ".join([*parts, f"loss {losses}"])


class Validator:
    """Measures the student every ``evaluation.every`` steps. With zero it does nothing.

    The teacher reads the text once. What it computed is kept in host memory, so that validations
    compare with it after its weights are freed.

    Args:
        config: the configuration of the run.
        evaluator: the evaluation of the run, whose windows the validations take a part of.
        first_step: the first step whose validations compete for the best one.

    Attributes:
        results: all validations of the run, in order.

    Raises:
        UserError: validations are asked for that cannot be made.
    """

    def __init__(self, config: Config, evaluator: Evaluator, first_step: int):
        self.config, self.evaluator = config.evaluation, evaluator
        self.last_step, self.first_step = config.steps, first_step
        self.results: list[Validation] = []
        self._comparable_from = 0
        self._baseline: list[Entry] = []
        self._recorded: dict[int, RecordedTeacher] = {}
        self._windows = {
            length: windows[: max(1, self.config.validation_tokens // length)]
            for length, windows in sorted(evaluator.suite.windows.items())
        }
        if self.config.every > 0:
            self._check(config.keeps_best)

    def _check(self, keeps_best: bool) -> None:
        if not self._windows:
            raise UserError(
                f"evaluation.every is {self.config.every}, and there is no held-out text to "
                "measure on: give evaluation.paths, or set evaluation.every 0"
            )
        native = self.evaluator.restoration.native_window
        if keeps_best and self.config.best == "gap_restored" and min(self._windows) > native:
            raise UserError(
                "evaluation.best gap_restored needs a length up to the native window of "
                f"{native} tokens, and the shortest one of evaluation.lengths is "
                f"{min(self._windows)}: add a shorter one, or set evaluation.best loss"
            )

    def before(self, teacher: Decoder, scaled: Decoder) -> None:
        """Measure the teacher and the scaled student, once; a collective call."""
        if not self.config.every:
            return
        mesh, dtype = self.evaluator.mesh, self.evaluator.dtype
        native = self.evaluator.restoration.native_window
        head_weight = teacher.head_weight.detach().to("cpu", dtype, copy=True)
        teacher_results = {}
        for length, windows in self._windows.items():
            if length <= native:
                teacher_results[length], self._recorded[length] = measure_and_record(
                    teacher, windows, mesh, dtype, head_weight
                )
        self._baseline = [
            Entry("teacher", Results(teacher_results)),
            Entry("scaled", Results(self._measure(scaled))),
        ]

    def is_due(self, step: int) -> bool:
        """Whether the student is validated after this step."""
        every = self.config.every
        return every > 0 and (step % every == 0 or step == self.last_step)

    def validate(self, student: Decoder, step: int) -> Validation:
        """Measure the student after a step, and note the result; a collective call."""
        restoration = self.evaluator.restoration
        entry = Entry(f"step {step}", Results(self._measure(student)))
        mean = partial(entry.short_mean, native_window=restoration.native_window)
        result = Validation(
            step,
            {length: m.loss for length, m in entry.results.by_length.items()},
            restoration.gap_restored(entry, self._baseline),
            mean("kl"),
            mean("agreement"),
        )
        # All ranks must find the same validation to be the best, and sums of other ranks may differ
        # in their last bit.
        self.results.append(from_rank_0(result, self.evaluator.mesh.world))
        return self.results[-1]

    def _measure(self, model: Decoder) -> dict:
        mesh, dtype = self.evaluator.mesh, self.evaluator.dtype
        return {
            length: measure(model, windows, mesh, dtype, self._recorded.get(length))
            for length, windows in self._windows.items()
        }

    @property
    def best(self) -> Validation | None:
        """The best validation of the last stage, the first of equals; None without any."""
        finite = [v for v in self._competing() if math.isfinite(self._score(v))]
        return min(finite, key=self._score, default=None)

    def has_stopped_improving(self) -> bool:
        """Whether ``evaluation.patience`` ends the run."""
        patience, competing, best = self.config.patience, self._competing(), self.best
        waited = len(competing) if best is None else len(competing) - 1 - competing.index(best)
        return 0 < patience <= waited

    def describe(self, validation: Validation) -> str:
        """Return in words what makes a validation better or worse than others."""
        if self.config.best == "gap_restored" and validation.gap_restored is not None:
            return f"gap restored {validation.gap_restored:.3f}"
        return f"loss {self._score(validation):.4f}"

    def _competing(self) -> list[Validation]:
        results = self.results[self._comparable_from :]
        return [result for result in results if result.step >= self.first_step]

    def _score(self, validation: Validation) -> float:
        """Return a mean loss. The share of the gap restored falls linearly with the short loss."""
        native = self.evaluator.restoration.native_window
        is_short = self.config.best == "gap_restored"
        losses = [x for n, x in validation.loss.items() if not is_short or n <= native]
        return sum(losses) / len(losses) if losses else math.nan

    def state(self) -> dict:
        """Return the validations for the manifest of a checkpoint."""
        results = [
            {**asdict(result), "loss": {str(n): loss for n, loss in result.loss.items()}}
            for result in self.results
        ]
        return {
            "text": self._fingerprint(),
            "comparable_from": self._comparable_from,
            "results": finite(results),
        }

    def resume(self, state: dict | None) -> bool:
        """Take over the validations of a checkpoint.

        Args:
            state: what ``state`` returned; None for a checkpoint without it.

        Returns:
            Whether later validations are compared with them. They are not if they read other text.
        """
        if not state:
            return True
        self.results = [_read(result) for result in state["results"]]
        is_same = not self.config.every or state["text"] == self._fingerprint()
        self._comparable_from = state["comparable_from"] if is_same else len(self.results)
        return is_same or not self.results

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for length, windows in self._windows.items():
            digest.update(str(length).encode())
            digest.update(windows.tobytes())
        return digest.hexdigest()


def _read(result: dict) -> Validation:
    loss = {int(n): math.nan if x is None else x for n, x in result["loss"].items()}
    return Validation(**{**result, "loss": loss})
