"""Several models' results next to each other: tables for the terminal, and one JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megalard.errors import UserError, reason_of, shown
from megalard.evaluation.measure import Measurement
from megalard.evaluation.suite import Results, TaskResult
from megalard.files.reading import read_json as read_json_file


@dataclass
class Entry:
    """One model of a comparison.

    Attributes:
        name: the name of the model in tables and plots.
        results: what was measured.
        tokens: the number of tokens that the model was restored with; 0 if it was not restored.
        window: the model's window in tokens.
        directory, kind: where the model is and how it is stored (``megalard.checkpoint.open``).
    """

    name: str
    results: Results
    tokens: int = 0
    window: int | None = None
    directory: str = ""
    kind: str = ""

    def short_loss(self, native_window: int) -> float:
        """Return the mean loss over the measured lengths up to the native window."""
        losses = [m.loss for n, m in self.results.by_length.items() if n <= native_window]
        return sum(losses) / len(losses) if losses else float("nan")

    def short_mean(self, field: str, native_window: int) -> float | None:
        """Return the mean of kl or agreement over the lengths up to the native window."""
        by_length = self.results.by_length
        values = [getattr(m, field) for n, m in by_length.items() if n <= native_window]
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Restoration:
    """A comparison whose first entry is the teacher and whose second is the scaled student.

    The other entries are restored students, whose share of the restored gap is reported.
    """

    native_window: int
    factor: float

    def gap_restored(self, entry: Entry, entries: Sequence[Entry]) -> float | None:
        """Return (L_scaled - L) / (L_scaled - L_teacher) on short text; None if there is no gap."""
        teacher, scaled = (e.short_loss(self.native_window) for e in entries[:2])
        gap = scaled - teacher
        return (scaled - entry.short_loss(self.native_window)) / gap if gap > 0 else None


def print_tables(
    entries: Sequence[Entry],
    restoration: Restoration | None = None,
    console: Console | None = None,
) -> None:
    """Print perplexity and agreement by length, loss by position, and retrieval tasks.

    For a restoration, one table has perplexity by length, the restored share of the gap, and the
    means of KL and agreement over lengths up to the native window.
    """
    results = entries[0].results
    if restoration is not None:
        (console or Console(width=140)).print(_restoration_table(entries, restoration))
        return
    console = console or Console(width=None if Console().is_terminal else 140)
    if results.by_length:
        console.print(_by_length(entries, "Perplexity by length", _perplexity))
        if any(m.kl is not None for m in results.by_length.values()):
            title = (
                "KL(teacher || model) / share of tokens with the teacher's most likely token, "
                "by length"
            )
            console.print(_by_length(entries, title, _agreement))
    if results.by_position:
        console.print(_by_position(entries))
    if results.tasks:
        console.print(_tasks(entries))


def _restoration_table(entries: Sequence[Entry], restoration: Restoration) -> Table:
    native = restoration.native_window
    table = Table(title=f"Perplexity by context length (native window M = {native})")
    table.add_column("model")
    lengths = sorted(entries[0].results.by_length)
    for heading in (*lengths, "gap restored", "KL to teacher", "same top-1", "tokens"):
        table.add_column(str(heading), justify="right")
    for number, entry in enumerate(entries):
        restored = restoration.gap_restored(entry, entries) if number >= 2 else None
        kl, agreement = (entry.short_mean(field, native) for field in ("kl", "agreement"))
        table.add_row(
            entry.name,
            *(_perplexity(entry.results.by_length[length]) for length in lengths),
            "" if restored is None else f"{restored:.3f}",
            "" if kl is None else f"{kl:.4f}",
            "" if agreement is None else f"{agreement:.3f}",
            f"{entry.tokens:,}" if entry.tokens else "",
        )
    return table


def _perplexity(m: Measurement) -> str:
    return f"{m.perplexity:.3f}"


def _agreement(m: Measurement) -> str:
    return "" if m.kl is None else f"{m.kl:.4f} / {m.agreement:.3f}"


def _by_length(entries: Sequence[Entry], title: str, cell: Callable[[Measurement], str]) -> Table:
    by_length = entries[0].results.by_length
    lengths = [n for n in by_length if any(cell(e.results.by_length[n]) for e in entries)]
    table = Table(title=title)
    table.add_column("model")
    for length in lengths:
        table.add_column(str(length), justify="right")
    for entry in entries:
        table.add_row(entry.name, *(cell(entry.results.by_length[n]) for n in lengths))
    return table


def _by_position(entries: Sequence[Entry]) -> Table:
    results = entries[0].results
    table = Table(title=f"Loss by position, in windows of {results.edges[-1]} tokens")
    table.add_column("model")
    for start, end in pairwise(results.edges):
        table.add_column(f"{start}-{end - 1}", justify="right")
    for entry in entries:
        table.add_row(entry.name, *(f"{m.loss:.3f}" for m in entry.results.by_position))
    return table


def _tasks(entries: Sequence[Entry]) -> Table:
    tasks = entries[0].results.tasks
    lengths = sorted({length for by_length in tasks.values() for length in by_length})
    table = Table(title="Exact answers (share of their tokens that are correct), by length")
    table.add_column("task")
    table.add_column("model")
    for length in lengths:
        table.add_column(str(length), justify="right")
    for task in tasks:
        for entry in entries:
            by_length = entry.results.tasks[task]
            cells = (
                f"{by_length[n].exact:.2f} ({by_length[n].tokens:.2f})" if n in by_length else ""
                for n in lengths
            )
            table.add_row(task, entry.name, *cells)
        table.add_section()
    return table


def write_json(
    path: Path,
    entries: Sequence[Entry],
    settings: dict,
    restoration: Restoration | None = None,
) -> None:
    """Write a comparison, which ``read_json`` reads. A number that is not finite becomes null.

    Args:
        settings: how the comparison was made.
    """
    content: dict = {"settings": settings}
    if restoration is not None:
        content |= {"native_context": restoration.native_window, "factor": restoration.factor}
    content["models"] = [_model(entry, entries, restoration) for entry in entries]
    path.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def _model(entry: Entry, entries: Sequence[Entry], restoration: Restoration | None) -> dict:
    def measurement(m: Measurement) -> dict:
        return {**asdict(m), "perplexity": m.perplexity}

    results = entry.results
    model: dict = {"name": entry.name, "tokens": entry.tokens}
    if restoration is not None:
        model["gap_restored"] = restoration.gap_restored(entry, entries)
    if entry.directory:
        model |= {"directory": entry.directory, "kind": entry.kind}
    intervals = zip(pairwise(results.edges), results.by_position, strict=True)
    return model | {
        "window": entry.window,
        "by_length": {str(n): measurement(m) for n, m in sorted(results.by_length.items())},
        "by_position": [
            {"first": start, "last": end - 1, **measurement(m)} for (start, end), m in intervals
        ],
        "tasks": {
            task: {str(n): asdict(result) for n, result in by_length.items()}
            for task, by_length in results.tasks.items()
        },
    }


def finite(value):
    """Return a value for JSON, in which every number that is not finite is null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> tuple[list[Entry], Restoration | None]:
    """Read a comparison that ``write_json`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is not a comparison, or lacks something that the tables need.
    """
    try:
        content = read_json_file(path)
        restoration = None
        if "native_context" in content:
            native, factor = content["native_context"], _number(content["factor"])
            restoration = Restoration(_of_type(int, native), factor)
        entries = [_read_entry(model) for model in _of_type(list, content["models"])]
        if len(entries) < (1 if restoration is None else 2):
            raise ValueError(f"it has {len(entries)} models")
        lengths = [entry.results.by_length.keys() for entry in entries]
        if any(other != lengths[0] for other in lengths):
            raise ValueError("its models were measured at different lengths")
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else reason_of(error)
        raise UserError(
            f"{path} is damaged or is not an evaluation ({what}): remove it and evaluate again"
        ) from None
    return entries, restoration


def _of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it has {shown(value)} where {kind.__name__} is needed")
    return value


def _number(value: Any) -> float:
    """Return a number, of which ``write_json`` writes null if it is not finite."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise ValueError(f"it has {shown(value)} where a number is needed")
    return float(value)


def _read_entry(model: dict) -> Entry:
    by_position = model.get("by_position", [])
    edges = [_of_type(int, interval["first"]) for interval in by_position]
    results = Results(
        {int(length): _read_measurement(m) for length, m in model["by_length"].items()},
        [*edges, _of_type(int, by_position[-1]["last"]) + 1] if by_position else [],
        [_read_measurement(m) for m in by_position],
        {
            task: {int(n): _read_task(result) for n, result in by_length.items()}
            for task, by_length in model.get("tasks", {}).items()
        },
    )
    window = model.get("window")
    return Entry(
        _of_type(str, model["name"]),
        results,
        _of_type(int, model.get("tokens", 0)),
        None if window is None else _of_type(int, window),
        _of_type(str, model.get("directory", "")),
        _of_type(str, model.get("kind", "")),
    )


def _read_measurement(m: dict) -> Measurement:
    values = [m["kl"], m["agreement"], m.get("accuracy")]
    return Measurement(
        _number(m["loss"]), *(None if value is None else _number(value) for value in values)
    )


def _read_task(result: dict) -> TaskResult:
    by_depth = {float(depth): _number(exact) for depth, exact in result["by_depth"].items()}
    exact, tokens, loss = (_number(result[key]) for key in ("exact", "tokens", "loss"))
    return TaskResult(exact, tokens, loss, _of_type(int, result["samples"]), by_depth)
