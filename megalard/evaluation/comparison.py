"""Several models' results side by side: tables, one JSON file, one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from megalard.evaluation.suite import Results
from megalard.parallel.mesh import SINGLE, Axis


@dataclass(frozen=True)
class Entry:
    """One model of a comparison.

    Attributes:
        name: what it is called in tables and plots.
        directory, kind: where it is and how it is stored (``megalard.checkpoint.open``).
        window: its own, in tokens.
    """

    name: str
    directory: str
    kind: str
    window: int
    results: Results


@contextmanager
def token_bar(total: int, axis: Axis = SINGLE) -> Iterator[Callable[[str, int], None]]:
    """A bar of ``total`` tokens on a terminal of rank 0; yields what names and advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    disable = axis.rank != 0 or not console.is_terminal
    with Progress(*columns, console=console, disable=disable) as bar:
        task = bar.add_task("", total=total)
        yield lambda name, tokens: bar.update(task, description=name, advance=tokens)


def short_names(directories: list[Path]) -> list[str]:
    """The shortest endings of the paths, at least the last part, that tell them apart."""
    parts = [path.absolute().parts for path in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    # the same directory twice
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def print_tables(entries: list[Entry], console: Console | None = None) -> None:
    """Perplexity and agreement by length, loss by position, exact answers by task and length."""
    console = console or Console(width=None if Console().is_terminal else 140)
    first = entries[0].results
    lengths = list(first.by_length)
    if lengths:
        _print_by_length(
            "Perplexity by length", entries, lengths, lambda m: f"{m.perplexity:.3f}", console
        )
        compared = [n for n in lengths if first.by_length[n].kl is not None]
        if compared:
            _print_by_length(
                "KL(teacher || model) / share of tokens with the teacher's first choice, by length",
                entries,
                compared,
                lambda m: f"{m.kl:.4f} / {m.agreement:.3f}",
                console,
            )
        table = Table(title=f"Loss by position, in windows of {lengths[-1]} tokens")
        edges = first.edges
        table.add_column("model")
        for start, end in pairwise(edges):
            table.add_column(f"{start}-{end - 1}", justify="right")
        for entry in entries:
            table.add_row(entry.name, *(f"{m.loss:.3f}" for m in entry.results.by_position))
        console.print(table)
    if first.tasks:
        lengths = sorted({length for by in first.tasks.values() for length in by})
        table = Table(title="Exact answers (share of their tokens that are right), by length")
        table.add_column("task")
        table.add_column("model")
        for length in lengths:
            table.add_column(str(length), justify="right")
        for task in first.tasks:
            for entry in entries:
                by = entry.results.tasks[task]
                cells = (
                    f"{by[n].exact:.2f} ({by[n].tokens:.2f})" if n in by else "" for n in lengths
                )
                table.add_row(task, entry.name, *cells)
            table.add_section()
        console.print(table)


def _print_by_length(title, entries, lengths, cell, console) -> None:
    table = Table(title=title)
    table.add_column("model")
    for length in lengths:
        table.add_column(str(length), justify="right")
    for entry in entries:
        by = entry.results.by_length
        table.add_row(entry.name, *(cell(by[length]) for length in lengths))
    console.print(table)


def to_json(entries: list[Entry], settings: dict) -> str:
    """The whole comparison; a figure that is not finite is null."""

    def measurement(m) -> dict:
        return {**asdict(m), "perplexity": m.perplexity}

    models = []
    for entry in entries:
        found = entry.results
        spans = zip(pairwise(found.edges), found.by_position, strict=True)
        models.append(
            {
                "name": entry.name,
                "directory": entry.directory,
                "kind": entry.kind,
                "window": entry.window,
                "by_length": {str(n): measurement(m) for n, m in found.by_length.items()},
                "by_position": [
                    {"first": start, "last": end - 1, **measurement(m)} for (start, end), m in spans
                ],
                "tasks": {
                    task: {str(n): asdict(result) for n, result in by.items()}
                    for task, by in found.tasks.items()
                },
            }
        )
    content = _finite({"settings": settings, "models": models})
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(path: Path, entries: list[Entry]) -> None:
    """Perplexity by length, loss by position, KL; each task by length; passkey by depth: a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = entries[0].results
    panels = []
    if first.by_length:
        panels += [_perplexity, _position]
        if any(m.kl is not None for m in first.by_length.values()):
            panels.append(_kl)
    panels += [lambda axes, entries, task=task: _task(axes, entries, task) for task in first.tasks]
    if "passkey" in first.tasks:
        panels += [lambda axes, entries, e=entry: _depths(axes, e) for entry in entries]
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    size = (5.2 * across, 3.9 * down)
    figure, grid = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes, entries)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


def _lines(axes, entries, points, ylabel: str, logarithmic: bool) -> None:
    ticks = set()
    for entry in entries:
        x, y = points(entry.results)
        axes.plot(x, y, marker="o", markersize=4, label=entry.name)
        ticks |= set(x)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [_length(tick) for tick in sorted(ticks)], rotation=45)
    axes.set_xticks([], minor=True)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _perplexity(axes, entries) -> None:
    def points(found: Results):
        return list(found.by_length), [m.perplexity for m in found.by_length.values()]

    _lines(axes, entries, points, "perplexity", logarithmic=True)
    axes.set_xlabel("length (tokens)")


def _position(axes, entries) -> None:
    def points(found: Results):
        return found.edges[1:], [m.loss for m in found.by_position]

    _lines(axes, entries, points, "loss (nats)", logarithmic=False)
    axes.set_xlabel("position, up to")


def _kl(axes, entries) -> None:
    def points(found: Results):
        pairs = [(n, m.kl) for n, m in found.by_length.items() if m.kl is not None]
        return [n for n, _ in pairs], [kl for _, kl in pairs]

    _lines(axes, entries, points, "KL(teacher || model), nats", logarithmic=False)
    axes.set_xlabel("length (tokens)")


def _task(axes, entries, task: str) -> None:
    def points(found: Results):
        return list(found.tasks[task]), [result.exact for result in found.tasks[task].values()]

    _lines(axes, entries, points, "exact answers", logarithmic=False)
    axes.set_ylim(-0.05, 1.05)
    axes.set_title(task)
    axes.set_xlabel("length (tokens)")


def _depths(axes, entry: Entry) -> None:
    by = entry.results.tasks["passkey"]
    depths = list(next(iter(by.values())).by_depth)
    cells = [[result.by_depth[depth] for result in by.values()] for depth in depths]
    axes.imshow(cells, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(by)), [_length(length) for length in by])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth")
    axes.set_title(f"passkey: {entry.name}", fontsize=10)
