"""The figures of a report, drawn with matplotlib and returned as SVG or PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager

from megalard.evaluation.plots import COLORS
from megalard.report.collect import LayerLosses, RunRecord

# A run may have more points than a figure can show.
_POINTS = 1000
_PANEL = (4.6, 3.1)
# The largest ratio of two losses that the heat map tells apart.
_RANGE = 1e4


def curves(record: RunRecord) -> bytes | None:
    """Draw loss, terms, learning rate, gradient norms and rate over the steps, as SVG."""
    if not record.steps:
        return None
    panels: list[tuple[str, list[str], bool]] = [
        ("loss", ["loss"], False),
        ("parts of the loss", record.keys("loss_"), True),
        ("learning rate", ["learning_rate"], False),
        ("gradient norm before clipping", record.keys("gradient_norm"), True),
        ("tokens per second", ["tokens_per_second"], False),
    ]
    return _panels(record, panels)


def validation_curves(record: RunRecord) -> bytes | None:
    """Draw what validations measured over the steps, as SVG; None without validations."""
    if not record.validations:
        return None
    panels: list[tuple[str, list[str], bool]] = [
        ("share of the gap restored", ["validation_gap_restored"], False),
        ("KL to the teacher", ["validation_kl"], False),
        ("same most likely token", ["validation_agreement"], False),
        ("loss by length", record.keys("validation_loss_"), False),
    ]
    return _panels(record, panels)


def _panels(record: RunRecord, panels: list[tuple[str, list[str], bool]]) -> bytes:
    drawn = [panel for panel in panels if any(record.curve(key)[0] for key in panel[1])]
    with _figure(len(drawn), "svg") as (grid, save):
        for axes, (title, keys, is_logarithmic) in zip(grid, drawn, strict=False):
            for number, key in enumerate(keys):
                x, y = (_thinned(values) for values in record.curve(key))
                marker = "o" if len(x) < 30 else None
                color = COLORS[number % len(COLORS)]
                axes.plot(x, y, color=color, marker=marker, markersize=3, label=_label(key))
                is_logarithmic = is_logarithmic and all(value > 0 for value in y)
            if is_logarithmic:
                axes.set_yscale("log")
            if len(keys) > 1:
                axes.legend(fontsize=7, ncols=2)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step", fontsize=8)
            axes.grid(alpha=0.3)
    return save()


def _label(key: str) -> str:
    for prefix in ("validation_loss_", "gradient_norm_", "loss_"):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return {"gradient_norm": "all"}.get(key, key)


def _thinned(values: Sequence) -> Sequence:
    """Return at most ``_POINTS`` of the values, with the first and the last one."""
    count = len(values)
    if count <= _POINTS:
        return values
    return [values[round(i * (count - 1) / (_POINTS - 1))] for i in range(_POINTS)]


def heat_map(losses: Sequence[LayerLosses], kind: str = "svg") -> bytes | None:
    """Draw the loss of each layer and part in the first and the last report.

    Args:
        kind: ``svg`` or ``png``.

    Returns:
        The picture; None if no part is read from layers.
    """
    if not losses:
        return None
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    grids = [
        [[math.nan if x is None else x for x in row] for row in rows]
        for rows in ([part.first for part in losses], [part.last for part in losses])
    ]
    values = [x for grid in grids for row in grid for x in row if math.isfinite(x)]
    positive = [x for x in values if x > 0]
    norm: Normalize = Normalize(0, 1)
    if positive:
        # A layer that scaling leaves alone has nearly no loss, and would take all of the range.
        lowest = max(min(positive), max(positive) / _RANGE)
        norm = LogNorm(lowest, max(max(positive), lowest * 1.001), clip=True)
    width = max(4.6, 0.16 * len(grids[0][0]) + 1.5)
    size = (width, 1.1 + 0.4 * len(losses))
    with _figure(2, kind, size) as (axes_of, save):
        titles = [
            f"first report (step {min(part.first_step for part in losses)})",
            f"last report (step {max(part.last_step for part in losses)})",
        ]
        for axes, grid, title in zip(axes_of, grids, titles, strict=False):
            image = axes.imshow(grid, aspect="auto", cmap="cividis", norm=norm)
            axes.set_yticks(range(len(losses)), [part.part for part in losses])
            axes.set_facecolor("#e8e8e8")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("layer", fontsize=8)
            axes.set_title(title, fontsize=10)
            axes.figure.colorbar(image, ax=axes)
    return save()


def rope_curves(teacher: Sequence[float], student: Sequence[float]) -> bytes | None:
    """Draw the wavelength of each pair of features before and after scaling, as SVG.

    Args:
        teacher, student: inverse frequencies.
    """
    if not teacher and not student:
        return None
    with _figure(1, "svg", (7.0, 3.4)) as (grid, save):
        for number, (label, values) in enumerate((("teacher", teacher), ("student", student))):
            waves = [2 * math.pi / value for value in values if value > 0]
            axes = grid[0]
            axes.plot(waves, color=COLORS[number], marker="o", markersize=2, label=label)
        axes.set_yscale("log")
        axes.set_xlabel("pair of features", fontsize=8)
        axes.set_ylabel("wavelength (tokens)", fontsize=8)
        axes.set_title("RoPE before and after scaling", fontsize=10)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return save()


@contextmanager
def _figure(panels: int, kind: str, size: tuple[float, float] = _PANEL):
    """Yield the axes of a figure, and a function that returns the picture afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, panels)
    rows = -(-panels // columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(size[0] * columns, size[1] * rows),
        layout="constrained",
        squeeze=False,
    )
    for axes in list(grid.flat)[panels:]:
        axes.axis("off")
    pictures: list[bytes] = []
    save: Callable[[], bytes] = lambda: pictures[0]  # noqa: E731
    try:
        yield list(grid.flat)[:panels], save
        buffer = io.BytesIO()
        # Without the names of its maker and of the time, the same run gives the same bytes.
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        with matplotlib.rc_context({"svg.hashsalt": "megalard"}):
            figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
        pictures.append(buffer.getvalue())
    finally:
        pyplot.close(figure)
