"""Collect what the report of a run shows, from the files in its output directory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalard.errors import UserError
from megalard.evaluation.report import Entry, Restoration, read_json
from megalard.files.reading import check_regular
from megalard.files.reading import read_json as read_json_file

METRICS, EVALUATION, SETTINGS, SUMMARY = (
    "metrics.jsonl",
    "evaluation.json",
    "run.json",
    "summary.json",
)
_VALIDATION = "validation_"


@dataclass(frozen=True)
class LayerLosses:
    """A part of the loss in each layer, in the first and the last report that has it.

    Attributes:
        part: the name of the part, such as ``q``.
        first_step, last_step: the steps of the two reports.
        first, last: one value per layer; None for a layer that is not compared.
    """

    part: str
    first_step: int
    last_step: int
    first: Sequence[float | None]
    last: Sequence[float | None]


@dataclass(frozen=True)
class Cost:
    """What the reported steps cost, without evaluation, saving and exports.

    Attributes:
        seconds: the time of the steps.
        tokens: the training tokens.
        peak_gib: peak memory of rank 0 in GiB; None if it is not known.
        ranks: the number of ranks; None if it is not known.
    """

    seconds: float
    tokens: int
    peak_gib: float | None
    ranks: int | None

    @property
    def tokens_per_second(self) -> float:
        """The mean rate over all ranks."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class RunRecord:
    """A run as its files describe it.

    Attributes:
        directory: the output directory.
        settings: the configuration as plain dictionaries; empty if it cannot be read.
        steps: the lines of metrics.jsonl about steps.
        validations: the lines of metrics.jsonl about validations.
        entries: what was evaluated before, between and after the stages.
        restoration: how the entries are compared; None without an evaluation.
        summary: what the run noted at its end; empty if it has not ended.
    """

    directory: Path
    settings: Mapping = field(default_factory=dict)
    steps: Sequence[Mapping] = ()
    validations: Sequence[Mapping] = ()
    entries: Sequence[Entry] = ()
    restoration: Restoration | None = None
    summary: Mapping = field(default_factory=dict)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and the values of a key of metrics.jsonl, where it has a number."""
        lines = self.validations if key.startswith(_VALIDATION) else self.steps
        pairs = [(line["step"], line[key]) for line in lines if _is_number(line.get(key))]
        return [step for step, _ in pairs], [float(value) for _, value in pairs]

    def keys(self, prefix: str) -> list[str]:
        """Return the keys of metrics.jsonl with a prefix, in the order of their first line."""
        lines = [*self.steps, *self.validations]
        return list(dict.fromkeys(key for line in lines for key in line if key.startswith(prefix)))

    def layer_losses(self) -> list[LayerLosses]:
        """Return each part of the loss by layer, at the beginning and at the end."""
        ends: dict[str, list[Mapping]] = {}
        for line in self.steps:
            for part in line.get("layers", {}):
                ends.setdefault(part, [line, line])[1] = line
        return [
            LayerLosses(
                part, a["step"], b["step"], tuple(a["layers"][part]), tuple(b["layers"][part])
            )
            for part, (a, b) in ends.items()
        ]

    def cost(self) -> Cost:
        """Return time, tokens and memory of the steps."""
        seconds, tokens = 0.0, 0
        for line in self.steps:
            rate, total = line.get("tokens_per_second"), int(line.get("tokens", tokens))
            if _is_number(rate) and rate > 0:
                seconds += (total - tokens) / rate
            tokens = total
        peaks = [line["memory_gib"] for line in self.steps if _is_number(line.get("memory_gib"))]
        ranks = self.summary.get("ranks")
        return Cost(seconds, tokens, max(peaks, default=None), ranks)


def collect(directory: Path) -> RunRecord:
    """Return what the files of a run contain. Files that are missing are left out.

    Raises:
        UserError: the directory is not the output directory of a run, or its metrics are not a
            regular file.
    """
    if not (directory / SETTINGS).is_file():
        raise UserError(f"{directory} is not the output directory of a run: it has no {SETTINGS}")
    lines = list(_lines(directory / METRICS))
    entries: list[Entry] = []
    restoration = None
    with contextlib.suppress(OSError, UserError):
        entries, restoration = read_json(directory / EVALUATION)
    return RunRecord(
        directory,
        _object(directory / SETTINGS),
        [line for line in lines if "loss" in line],
        [line for line in lines if any(key.startswith(_VALIDATION) for key in line)],
        entries,
        restoration,
        _object(directory / SUMMARY),
    )


def _lines(path: Path) -> Iterable[dict]:
    """Yield the lines that are complete: a run that goes on may be writing the last one."""
    with contextlib.suppress(FileNotFoundError):
        check_regular(path)
    with (
        contextlib.suppress(FileNotFoundError),
        open(path, encoding="utf-8", errors="replace") as file,
    ):
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield line


def _object(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError, UserError):
        value = read_json_file(path)
        return value if isinstance(value, dict) else {}
    return {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
