"""The numbers that the study compares methods by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from megalard.evaluation.measure import Measurement
from megalard.evaluation.report import Entry, Restoration
from megalard.evaluation.suite import Results
from tools.study.lengths import EDGES, FACTOR, NATIVE_WINDOW, STUDENT_WINDOW

# The shares of the gap whose number of tokens is reported.
SHARES = (0.90, 0.95, 0.983)
IN, OUT = "in the training domain", "out of it"

Measured = dict
"""The measurements of one model: ``domains`` and, where methods are compared, ``tasks``."""


@dataclass(frozen=True)
class Spread:
    """A number over several seeds.

    Attributes:
        mean: the mean; NaN without any seed.
        farthest: the distance of the farthest seed from the mean.
        count: the number of seeds.
    """

    mean: float
    farthest: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarize one number per seed."""
        values = list(values)
        if not values:
            return cls(math.nan, 0.0, 0)
        mean = float(np.mean(values))
        return cls(mean, max(abs(value - mean) for value in values), len(values))

    def text(self, digits: int) -> str:
        """Return the mean and the distance as text for a table."""
        if self.count == 0 or math.isnan(self.mean):
            return "-"
        around = f" ± {self.farthest:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:.{digits}f}{around}"


class Comparison:
    """The results of a study.

    Attributes:
        timings: method to its timed run.
        domain: the domain of the text that students were trained on.

    Args:
        results: as ``tools.study.results.reported`` returns them.
    """

    def __init__(self, results: list[dict], domain: str):
        self.domain = domain
        self.timings = {r["method"]: r for r in results if r["kind"] == "timing"}
        self._finals = [result for result in results if result["kind"] == "final"]
        baselines = [result for result in results if result["kind"] == "baseline"]
        self._baselines = {(r["method"], r["rope"]): r["compared"] for r in baselines}
        # Curves are measured on less text.
        self._curve_baselines = {(r["method"], r["rope"]): r["curve"][0] for r in baselines}
        self._restoration = Restoration(NATIVE_WINDOW, FACTOR)

    @property
    def ropes(self) -> list[str]:
        """The types of RoPE."""
        return sorted({result["rope"] for result in self._finals})

    @property
    def methods(self) -> list[str]:
        """The methods, in the order in which they were run."""
        return list(dict.fromkeys(result["method"] for result in self._finals))

    @property
    def teacher(self) -> Measured:
        """The measurements of the teacher."""
        return _of_teacher(self._baselines)

    def scaled(self, rope: str) -> Measured:
        """Return the measurements of the scaled student."""
        return self._baselines["scaled", rope]

    def runs(self, method: str, rope: str) -> list[dict]:
        """Return the final runs of a method, one per seed."""
        return [r for r in self._finals if (r["method"], r["rope"]) == (method, rope)]

    def over_seeds(self, method: str, rope: str, number: Callable[[Measured], float]) -> Spread:
        """Return a number of the measurements where methods are compared, over all seeds."""
        return Spread.of(number(run["compared"]) for run in self.runs(method, rope))

    def domains(self, where: str) -> list[str]:
        """Return the training domain (``IN``) or all others (``OUT``)."""
        names = sorted(self.teacher["domains"])
        return [name for name in names if (name == self.domain) == (where == IN)]

    def entry(self, measured: Measured, where: str) -> Entry:
        """Return the means over domains, as ``megalard.evaluation.report`` takes them."""
        domains = [measured["domains"][name] for name in self.domains(where)]
        lengths = [int(key) for key in domains[0] if key.isdigit()]
        by_length = {n: _mean([domain[str(n)] for domain in domains]) for n in lengths}
        intervals = zip(*(domain.get("by_position", []) for domain in domains), strict=True)
        by_position = [_mean(interval) for interval in intervals]
        return Entry("", Results(by_length, list(EDGES) if by_position else [], by_position))

    def short_loss(self, measured: Measured, where: str) -> float:
        """Return the mean loss over lengths up to M."""
        return self.entry(measured, where).short_loss(NATIVE_WINDOW)

    def short_mean(self, measured: Measured, where: str, field: str) -> float:
        """Return the mean of kl, agreement or accuracy over lengths up to M."""
        mean = self.entry(measured, where).short_mean(field, NATIVE_WINDOW)
        return math.nan if mean is None else mean

    def long_loss(self, measured: Measured, where: str) -> float:
        """Return the loss in windows of f M tokens."""
        return self.entry(measured, where).results.by_length[STUDENT_WINDOW].loss

    def far_loss(self, measured: Measured, where: str) -> float:
        """Return the loss over the last eighth of the positions of these windows."""
        return self.entry(measured, where).results.by_position[-1].loss

    def restored(self, measured: Measured, rope: str, where: str) -> float:
        """Return (L_scaled - L) / (L_scaled - L_teacher) on short text."""
        return self._share(measured, self.teacher, self.scaled(rope), where)

    def _share(self, measured: Measured, teacher: Measured, scaled: Measured, where: str) -> float:
        entries = [self.entry(model, where) for model in (teacher, scaled)]
        share = self._restoration.gap_restored(self.entry(measured, where), entries)
        return math.nan if share is None else share

    def score_kept(self, measured: Measured, where: str) -> float:
        """Return the next-token accuracy on short text, relative to the teacher's."""
        accuracy, best = (
            self.short_mean(model, where, "accuracy") for model in (measured, self.teacher)
        )
        return accuracy / best

    def exact(self, measured: Measured, task: str, beyond: bool) -> float:
        """Return the share of a task's samples that are answered exactly.

        Args:
            beyond: whether the samples are longer than M tokens.
        """
        by_length = measured["tasks"].get(task, {})
        values = [r["exact"] for n, r in by_length.items() if (int(n) > NATIVE_WINDOW) == beyond]
        return float(np.mean(values)) if values else math.nan

    def curve(self, method: str, rope: str, where: str) -> tuple[list[int], list[Spread]]:
        """Return numbers of training tokens, and the share of the gap restored after each."""
        runs = self.runs(method, rope)
        tokens = [point["tokens"] for point in runs[0]["curve"]]
        baselines = (_of_teacher(self._curve_baselines), self._curve_baselines["scaled", rope])
        shares = [
            Spread.of(self._share(run["curve"][i], *baselines, where) for run in runs)
            for i in range(len(tokens))
        ]
        return tokens, shares

    def tokens_needed(self, method: str, rope: str, where: str, share: float) -> float | None:
        """Return the training tokens at which the mean curve first reaches a share of the gap.

        It is interpolated on the logarithm of the tokens. None if the share is never reached.
        """
        tokens, shares = self.curve(method, rope, where)
        previous = None
        for count, reached in zip(tokens, (spread.mean for spread in shares), strict=True):
            if reached >= share:
                if previous is None or reached == previous[1]:
                    return float(count)
                part = (share - previous[1]) / (reached - previous[1])
                return math.exp(math.log(previous[0]) * (1 - part) + math.log(count) * part)
            previous = (count, reached)
        return None


def _of_teacher(baselines: dict[tuple[str, str], Measured]) -> Measured:
    return next(measured for (name, _), measured in baselines.items() if name == "teacher")


def _mean(measurements: Iterable[dict]) -> Measurement:
    """Return the mean of measurements, field by field; None where one of them has no value."""
    measurements = list(measurements)

    def mean(field: str) -> float | None:
        values = [measurement[field] for measurement in measurements]
        return None if None in values else float(np.mean(values))

    loss = mean("loss")
    return Measurement(
        math.nan if loss is None else loss, mean("kl"), mean("agreement"), mean("accuracy")
    )
