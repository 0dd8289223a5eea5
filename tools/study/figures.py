"""The study's numbers, from what its runs measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from tools.study.methods import NATIVE
from tools.study.worker import SHORT, WINDOW

SHARES = (0.90, 0.95, 0.983)
IN, OUT = "in the training domain", "out of it"


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and the distance of the farthest seed from it."""

    mean: float
    farthest: float
    count: int

    def text(self, digits: int) -> str:
        if self.count == 0 or math.isnan(self.mean):
            return "-"
        around = f" ± {self.farthest:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:.{digits}f}{around}"


def spread(values: Iterable[float]) -> Spread:
    values = list(values)
    if not values:
        return Spread(math.nan, 0.0, 0)
    mean = float(np.mean(values))
    return Spread(mean, max(abs(value - mean) for value in values), len(values))


class Results:
    """What the runs measured; ``domain`` is the one whose text restored."""

    def __init__(self, results: list[dict], domain: str):
        self.domain = domain
        self.finals = [found for found in results if found["kind"] == "final"]
        self.timings = {found["method"]: found for found in results if found["kind"] == "timing"}
        baselines = [found for found in results if found["kind"] == "baseline"]
        self.baselines = {
            (found["method"], found["rope"]): found["compared"] for found in baselines
        }
        # on the text that curves are measured on, which is less
        self._curve_baselines = {
            (found["method"], found["rope"]): found["curve"][0] for found in baselines
        }

    @property
    def ropes(self) -> list[str]:
        return sorted({found["rope"] for found in self.finals})

    @property
    def methods(self) -> list[str]:
        """In the order in which they were run."""
        return list(dict.fromkeys(found["method"] for found in self.finals))

    @property
    def teacher(self) -> dict:
        return next(found for (name, _), found in self.baselines.items() if name == "teacher")

    def scaled(self, rope: str) -> dict:
        return self.baselines["scaled", rope]

    def domains(self, where: str) -> list[str]:
        every = sorted(self.teacher["domains"])
        return [name for name in every if (name == self.domain) == (where == IN)]

    def runs(self, method: str, rope: str) -> list[dict]:
        return [f for f in self.finals if (f["method"], f["rope"]) == (method, rope)]

    def over_seeds(self, method: str, rope: str, number: Callable[[dict], float]) -> Spread:
        """``number`` of what was measured at the tokens where methods are compared."""
        return spread(number(found["compared"]) for found in self.runs(method, rope))

    # each of these takes what was measured of one model: {"domains": ..., "tasks": ...}

    def short(self, measured: dict, where: str, field: str = "loss") -> float:
        """Mean over domains and lengths up to M."""
        values = [
            measured["domains"][domain][str(length)][field]
            for domain in self.domains(where)
            for length in SHORT
        ]
        return float(np.mean(values))

    def long_loss(self, measured: dict, where: str) -> float:
        """Mean over domains of the loss in windows of f M tokens."""
        windows = [measured["domains"][domain][str(WINDOW)] for domain in self.domains(where)]
        return float(np.mean([window["loss"] for window in windows]))

    def far_loss(self, measured: dict, where: str) -> float:
        """The same over the last eighth of the positions, each behind 7/8 f M tokens of text."""
        rows = [measured["domains"][domain]["by_position"][-1] for domain in self.domains(where)]
        return float(np.mean([row["loss"] for row in rows]))

    def restored(self, measured: dict, rope: str, where: str) -> float:
        """(L_scaled - L) / (L_scaled - L_teacher) on short text."""
        return self._share(measured, self.scaled(rope), self.teacher, where)

    def _share(self, measured: dict, scaled: dict, teacher: dict, where: str) -> float:
        own, worst, best = (self.short(found, where) for found in (measured, scaled, teacher))
        return (worst - own) / (worst - best)

    def score_kept(self, measured: dict, where: str) -> float:
        """Next-token accuracy on short text over the teacher's."""
        own = self.short(measured, where, "accuracy")
        return own / self.short(self.teacher, where, "accuracy")

    def exact(self, measured: dict, task: str, beyond: bool) -> float:
        """Share of a task's samples answered exactly, within M tokens or beyond."""
        by = measured["tasks"].get(task, {})
        values = [row["exact"] for n, row in by.items() if (int(n) > NATIVE) == beyond]
        return float(np.mean(values)) if values else math.nan

    def curve(self, method: str, rope: str, where: str) -> tuple[list[int], list[Spread]]:
        """Share of the gap restored against training tokens, over seeds."""
        runs = self.runs(method, rope)
        tokens = [point["tokens"] for point in runs[0]["curve"]]
        scaled = self._curve_baselines["scaled", rope]
        teacher = next(found for (n, _), found in self._curve_baselines.items() if n == "teacher")
        shares = [
            spread(self._share(run["curve"][i], scaled, teacher, where) for run in runs)
            for i in range(len(tokens))
        ]
        return tokens, shares

    def tokens_needed(self, method: str, rope: str, where: str, share: float) -> float | None:
        """Training tokens at which the mean curve first reaches a share of the gap.

        Interpolated on the log of the tokens; None if it is never reached.
        """
        tokens, shares = self.curve(method, rope, where)
        before = None
        for count, reached in zip(tokens, (found.mean for found in shares), strict=True):
            if reached >= share:
                if before is None or reached == before[1]:
                    return float(count)
                part = (share - before[1]) / (reached - before[1])
                return math.exp(math.log(before[0]) * (1 - part) + math.log(count) * part)
            before = (count, reached)
        return None
