"""The tables of the study of a pre-trained model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalard.errors import UserError
from tools.study.pretrained.methods import METHODS, STAGES, Method
from tools.study.pretrained.run import validation_loss

# Stages on long text are judged by long windows as well.
_LONG_STAGES = ("cpt", "longred", "mix")
_ROPE_NAMES = {"linear": "PI", "yarn": "YaRN"}
_BLIMP = "blimp"


def best_rates(results: list[dict], method: Method, rope: str) -> tuple[float, ...]:
    """Return the learning rate of each stage with the lowest validation loss.

    A RoPE that was not searched takes the rate of one that was.

    Raises:
        UserError: no rate of a stage was tried.
    """
    rates = []
    for stage in method.stages:
        tried = [r for r in results if (r["kind"], r["method"]) == ("search", stage)]
        tried = [result for result in tried if result["rope"] == rope] or tried
        if not tried:
            raise UserError(
                f"no learning rate of {stage} was tried: run the command search with it first"
            )
        rates.append(min(tried, key=lambda r: _validation(r, stage))["rates"][0])
    return tuple(rates)


def _validation(result: dict, stage: str) -> float:
    domain = next(iter(result["validation"].values()))
    lengths = sorted(int(length) for length in domain if length.isdigit())
    return validation_loss(result, stage in _LONG_STAGES, tuple(lengths[:-1]))


@dataclass(frozen=True)
class Number:
    """A mean over seeds.

    Attributes:
        mean: the mean.
        error: a standard error: over seeds for a loss, over questions for a share of questions.
    """

    mean: float
    error: float = 0.0

    def text(self, digits: int) -> str:
        """Return the mean and the error as text for a table."""
        if math.isnan(self.mean):
            return "-"
        around = f" ± {self.error:.{digits}f}" if self.error else ""
        return f"{self.mean:.{digits}f}{around}"


class Group:
    """All runs with one RoPE and factor.

    Args:
        results: the results of the study.
        domain: the domain of the text that students were trained on.
    """

    def __init__(self, results: list[dict], rope: str, factor: int, domain: str):
        self.rope, self.factor, self.domain = rope, factor, domain
        baselines = [r for r in results if r["kind"] == "baseline" and r["factor"] == factor]
        self.teacher = next(r for r in baselines if r["method"] == "teacher")
        self.scaled = next(r for r in baselines if (r["method"], r["rope"]) == ("scaled", rope))
        self._finals = [
            r
            for r in results
            if r["kind"] == "final" and (r["rope"], r["factor"]) == (rope, factor)
        ]

    @property
    def title(self) -> str:
        """The heading of the table."""
        return f"{_ROPE_NAMES[self.rope]} x {self.factor}"

    def rows(self) -> Iterator[tuple[str, list[dict]]]:
        """Yield the label of each row with its runs, one per seed."""
        yield "teacher", [self.teacher]
        yield "not restored", [self.scaled]
        order = list(METHODS)
        rows: dict[tuple, list[dict]] = {}
        for run in self._finals:
            key = (order.index(run["method"]), run["tokens"], tuple(run["rates"]))
            rows.setdefault(key, []).append(run)
        for key in sorted(rows):
            yield METHODS[order[key[0]]].label, rows[key]

    def short_loss(self, run: dict) -> float:
        """Return the mean loss on short text out of the training domain."""
        return float(np.mean([np.mean(losses) for losses in self._short(run, "loss")]))

    def agreement(self, run: dict) -> float:
        """Return the share of tokens with the teacher's first choice, out of the domain."""
        return float(np.mean([np.mean(values) for values in self._short(run, "agreement")]))

    def _short(self, run: dict, field: str) -> list[list[float]]:
        text = run["measured"]["text"]
        names = [name for name in text if name != self.domain]
        longest = max(int(length) for length in text[names[0]] if length.isdigit())
        return [
            [
                m[field]
                for length, m in text[name].items()
                if length.isdigit() and int(length) < longest
            ]
            for name in names
        ]

    def gap(self, run: dict) -> float:
        """Return the share of the short-text loss that scaling costs and the run won back."""
        scaled, teacher = self.short_loss(self.scaled), self.short_loss(self.teacher)
        return (scaled - self.short_loss(run)) / (scaled - teacher)

    def far_loss(self, run: dict) -> float:
        """Return the loss over the last window of M positions, over all domains."""
        return float(np.mean([m["by_position"][-1] for m in run["measured"]["text"].values()]))

    def kept(self, runs: Sequence[dict], tasks: Callable[[str], bool]) -> Number:
        """Return the score over the teacher's, in percent, with its standard error.

        The error is that of the mean difference to the teacher over the questions. Questions that
        both answer alike do not add to it.
        """
        names = [name for name in self.teacher["measured"]["choices"] if tasks(name)]

        def answers(run: dict, name: str) -> np.ndarray:
            return np.array([int(digit) for digit in run["measured"]["choices"][name]])

        difference, variance, best = 0.0, 0.0, 0.0
        for name in names:
            teacher = answers(self.teacher, name)
            student = np.mean([answers(run, name) for run in runs], axis=0)
            best += teacher.mean() / len(names)
            difference += (student - teacher).mean() / len(names)
            variance += (student - teacher).var(ddof=1) / len(teacher) / len(names) ** 2
        return Number(100 * (1 + difference / best), 100 * math.sqrt(variance) / best)

    def exact(self, run: dict, task: str) -> float:
        """Return the share of a retrieval task that is answered exactly beyond M."""
        by_length = run["measured"]["tasks"][task]
        shortest = min(map(int, by_length))
        return float(np.mean([m["exact"] for n, m in by_length.items() if int(n) > shortest]))

    def over_seeds(self, runs: Sequence[dict], number: Callable[[dict], float]) -> Number:
        """Return the mean of a number over seeds, and its standard error."""
        values = [number(run) for run in runs]
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
        return Number(float(np.mean(values)), error)


def groups(results: list[dict], domain: str) -> list[Group]:
    """Return the groups of runs that have been measured.

    Raises:
        UserError: there is none.
    """
    keys = dict.fromkeys((r["factor"], r["rope"]) for r in results if r["kind"] == "final")
    if not keys:
        raise UserError("there are no results of final runs to report: run the command final first")
    return [Group(results, rope, factor, domain) for factor, rope in sorted(keys)]


HEADINGS = (
    "",
    "tokens",
    "rates",
    "seeds",
    "short loss, out",
    "gap restored, %",
    "same first choice, %",
    "BLiMP kept, %",
    "choice kept, %",
    "loss, last M positions",
    "passkey beyond M",
    "multi_key beyond M",
    "GPU time, s",
)


def table(group: Group) -> str:
    """Return the table of a group in Markdown."""
    lines = [f"### {group.title}\n", "| " + " | ".join(HEADINGS) + " |"]
    lines.append("|---" * len(HEADINGS) + "|")
    for label, runs in group.rows():
        trained = runs[0].get("rates") or []
        cells = [
            label,
            f"{runs[0]['tokens'] / 1e6:g}M" if trained else "",
            ", ".join(f"{rate:g}" for rate in trained),
            str(len(runs)) if trained else "",
            group.over_seeds(runs, group.short_loss).text(3),
            group.over_seeds(runs, lambda run: 100 * group.gap(run)).text(1),
            group.over_seeds(runs, lambda run: 100 * group.agreement(run)).text(1),
            group.kept(runs, lambda task: task == _BLIMP).text(1),
            group.kept(runs, lambda task: task != _BLIMP).text(1),
            group.over_seeds(runs, group.far_loss).text(3),
            group.over_seeds(runs, lambda run: group.exact(run, "passkey")).text(2),
            group.over_seeds(runs, lambda run: group.exact(run, "multi_key")).text(2),
            f"{np.mean([run['training_seconds'] for run in runs]):.0f}" if trained else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rates_table(results: list[dict]) -> str:
    """Return the table of the searched learning rates."""
    lines = ["### Learning rates\n", "| stage | RoPE | validation loss by rate |", "|---|---|---|"]
    for stage in STAGES:
        for rope, name in _ROPE_NAMES.items():
            tried = [
                (r["rates"][0], _validation(r, stage))
                for r in results
                if (r["kind"], r["method"], r["rope"]) == ("search", stage, rope)
            ]
            if tried:
                cells = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(tried))
                lines.append(f"| {STAGES[stage].label} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def write_report(output: Path, results: list[dict], domain: str) -> None:
    """Print the tables, and write them with JSON into a directory."""
    measured_groups = groups(results, domain)
    tables = [*(table(group) for group in measured_groups), rates_table(results)]
    output.mkdir(parents=True, exist_ok=True)
    (output / "pretrained-tables.md").write_text("\n".join(tables))
    numbers = {
        f"{group.title}/{label}/{runs[0]['tokens']}": {
            "seeds": len(runs),
            "gap": group.over_seeds(runs, group.gap).mean,
            "blimp": group.kept(runs, lambda task: task == _BLIMP).__dict__,
            "choice": group.kept(runs, lambda task: task != _BLIMP).__dict__,
            "far_loss": group.over_seeds(runs, group.far_loss).mean,
        }
        for group in measured_groups
        for label, runs in group.rows()
    }
    (output / "pretrained.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print("\n".join(tables))
