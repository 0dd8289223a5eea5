"""Several models' results as one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from megalard.evaluation.report import Entry, Restoration
from megalard.evaluation.suite import Results

# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")

Panel = Callable[..., None]


def draw(
    path: Path | IO[bytes], entries: Sequence[Entry], restoration: Restoration | None = None
) -> None:
    """Draw what was measured as a PNG file, or into an open file.

    The panels are perplexity by length, loss by position, KL to the teacher, each retrieval task by
    length, and passkey retrieval by depth.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(entries, restoration)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (5.2 * columns, 4.2 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes, entries)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside upper center", ncols=min(2 * columns, len(labels))
        )
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


def _panels(entries: Sequence[Entry], restoration: Restoration | None) -> list[Panel]:
    results = entries[0].results
    panels: list[Panel] = []
    if results.by_length:
        native = restoration.native_window if restoration else None
        panels.append(lambda axes, entries: _perplexity(axes, entries, native))
        if results.by_position:
            panels.append(_position)
        if any(m.kl is not None for e in entries for m in e.results.by_length.values()):
            panels.append(_kl)
    panels += [
        lambda axes, entries, task=task: _task(axes, entries, task) for task in results.tasks
    ]
    if "passkey" in results.tasks:
        panels += [lambda axes, entries, e=entry: _depths(axes, e) for entry in entries]
    return panels


def _lines(axes, entries: Sequence[Entry], points, ylabel: str, is_logarithmic: bool) -> None:
    """Draw one line per model over lengths or positions, with plain numbers on the axes."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ticks = set()
    for number, entry in enumerate(entries):
        x, y = points(entry.results)
        color = COLORS[number % len(COLORS)]
        axes.plot(x, y, marker="o", markersize=4, color=color, label=entry.name)
        ticks |= set(x)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [short_length(tick) for tick in sorted(ticks)], rotation=45)
    axes.set_xticks([], minor=True)
    if is_logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)


def short_length(tokens: int) -> str:
    """Return a number of tokens as ``4K`` where that is exact."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _perplexity(axes, entries: Sequence[Entry], native_window: int | None) -> None:
    def points(results: Results):
        lengths = sorted(results.by_length)
        return lengths, [results.by_length[n].perplexity for n in lengths]

    _lines(axes, entries, points, "perplexity", is_logarithmic=True)
    if native_window is not None:
        axes.axvline(
            native_window, color="grey", linestyle=":", label=f"native window M = {native_window}"
        )
    axes.set_xlabel("context length (tokens)")
    axes.set_title("Perplexity by context length")


def _position(axes, entries: Sequence[Entry]) -> None:
    def points(results: Results):
        return results.edges[1:], [m.loss for m in results.by_position]

    _lines(axes, entries, points, "loss (nats)", is_logarithmic=False)
    axes.set_xlabel("position in the window, up to")
    axes.set_title("Loss by position")


def _kl(axes, entries: Sequence[Entry]) -> None:
    def points(results: Results):
        pairs = [(n, m.kl) for n, m in sorted(results.by_length.items()) if m.kl is not None]
        return [n for n, _ in pairs], [kl for _, kl in pairs]

    _lines(axes, entries, points, "KL(teacher || model), nats", is_logarithmic=False)
    axes.set_xlabel("context length (tokens)")
    axes.set_title("Distance from the teacher")


def _task(axes, entries: Sequence[Entry], task: str) -> None:
    def points(results: Results):
        by_length = results.tasks[task]
        return list(by_length), [result.exact for result in by_length.values()]

    _lines(axes, entries, points, "share of exact answers", is_logarithmic=False)
    axes.set_ylim(-0.05, 1.05)
    axes.set_title(task)
    axes.set_xlabel("context length (tokens)")


def _depths(axes, entry: Entry) -> None:
    by_length = entry.results.tasks["passkey"]
    depths = list(next(iter(by_length.values())).by_depth)
    cells = [[result.by_depth[depth] for result in by_length.values()] for depth in depths]
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            color = "black" if value > 0.6 else "white"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color
            )
    axes.figure.colorbar(image, ax=axes, label="share of exact answers")
    axes.set_xticks(range(len(by_length)), [short_length(length) for length in by_length])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth of the passkey")
    axes.set_title(f"passkey: {entry.name}", fontsize=10)
