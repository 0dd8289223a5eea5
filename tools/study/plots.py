"""The plots of the study's report."""

from __future__ import annotations

from pathlib import Path

from megalard.evaluation.plots import COLORS, short_length
from tools.study.comparison import OUT, SHARES, Comparison, Measured
from tools.study.lengths import EDGES, FACTOR, NATIVE_WINDOW, TASK_LENGTHS
from tools.study.methods import METHODS

ROPE_NAMES = {"linear": "PI", "yarn": "YaRN"}
_DPI = 130


def plot_curves(path: Path, comparison: Comparison) -> None:
    """Draw the share of the short-text gap restored out of the training domain, by tokens."""
    from matplotlib.ticker import EngFormatter

    figure, panels = _figure(len(comparison.ropes))
    for panel, rope in zip(panels, comparison.ropes, strict=True):
        all_tokens: list[int] = []
        for method in _methods(comparison, rope):
            tokens, shares = comparison.curve(method, rope, OUT)
            all_tokens += tokens
            means = [share.mean for share in shares]
            color = _color(method)
            panel.plot(tokens, means, marker=".", color=color, label=METHODS[method].label)
            low = [share.mean - share.farthest for share in shares]
            high = [share.mean + share.farthest for share in shares]
            panel.fill_between(tokens, low, high, color=color, alpha=0.15)
        for share in SHARES:
            panel.axhline(share, color="grey", linestyle=":", linewidth=0.8)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        # Given, because there is no share to draw where scaling has opened no gap.
        panel.set_xlim(0.8 * min(all_tokens), 1.25 * max(all_tokens))
        panel.set_ylim(-0.15, 1.05)
        panel.set_xlabel("training tokens")
        panel.set_title(f"{ROPE_NAMES[rope]} x {FACTOR}")
    panels[0].set_ylabel("short-text gap restored,\nout of the training domain (curve text)")
    _legend(figure, panels)
    figure.savefig(path, dpi=_DPI)


def plot_positions(path: Path, comparison: Comparison) -> None:
    """Draw the loss by position in windows of f M tokens, out of the training domain."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, panels = _figure(len(comparison.ropes))
    ends = EDGES[1:]

    def losses(measured: Measured) -> list[float]:
        return [m.loss for m in comparison.entry(measured, OUT).results.by_position]

    for panel, rope in zip(panels, comparison.ropes, strict=True):
        panel.plot(ends, losses(comparison.teacher), "k--", label="teacher")
        panel.plot(ends, losses(comparison.scaled(rope)), "k:", label="not restored")
        for method in _methods(comparison, rope):
            runs = [losses(run["compared"]) for run in comparison.runs(method, rope)]
            means = [sum(column) / len(column) for column in zip(*runs, strict=True)]
            label, color = METHODS[method].label, _color(method)
            panel.plot(ends, means, marker=".", color=color, label=label)
        native = f"native window M = {NATIVE_WINDOW}"
        panel.axvline(NATIVE_WINDOW, color="grey", linewidth=0.8, label=native)
        panel.set_title(f"{ROPE_NAMES[rope]} x {FACTOR}")
        panel.set_xlabel("position in the window, up to")
        panel.set_xscale("log", base=2)
        labeled = [end for end in ends if end & (end - 1) == 0]
        panel.set_xticks(labeled, [short_length(end) for end in labeled])
        panel.set_xticks([], minor=True)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("loss, nats, out of the\ntraining domain (test text)")
    _legend(figure, panels)
    figure.savefig(path, dpi=_DPI)


def plot_passkey(path: Path, comparison: Comparison) -> None:
    """Draw how many passkeys are answered by depth and length, one row of panels per RoPE."""
    from matplotlib import pyplot

    rows = [_passkey_models(comparison, rope) for rope in comparison.ropes]
    columns = max(map(len, rows))
    size = (1.9 * columns, 2.3 * len(rows))
    figure, grid = pyplot.subplots(
        len(rows), columns, figsize=size, layout="constrained", squeeze=False
    )
    for rope, models, panels in zip(comparison.ropes, rows, grid, strict=True):
        for panel in panels[len(models) :]:
            panel.set_axis_off()
        for panel, (label, runs) in zip(panels, models, strict=False):
            image = _draw_passkey(panel, [run["tasks"]["passkey"] for run in runs])
            panel.set_title(label, fontsize=8)
        panels[0].set_ylabel(f"{ROPE_NAMES[rope]} x {FACTOR}\ndepth", fontsize=8)
    figure.colorbar(image, ax=grid, label="share of exact answers", fraction=0.02)
    figure.supxlabel(f"length in tokens; native window M = {NATIVE_WINDOW}", fontsize=8)
    figure.savefig(path, dpi=_DPI)


def _passkey_models(comparison: Comparison, rope: str) -> list[tuple[str, list[Measured]]]:
    """Return the label and the measurements of every model with a RoPE."""
    models = [("teacher", [comparison.teacher]), ("not restored", [comparison.scaled(rope)])]
    for method in _methods(comparison, rope):
        runs = [run["compared"] for run in comparison.runs(method, rope)]
        models.append((METHODS[method].label, runs))
    return models


def _draw_passkey(panel, results: list[dict]):
    """Draw the mean share of exact answers by depth and length; return the image."""
    lengths = [length for length in TASK_LENGTHS if str(length) in results[0]]
    depths = list(results[0][str(lengths[0])]["by_depth"])
    shares = [
        [
            sum(result[str(length)]["by_depth"][depth] for result in results) / len(results)
            for length in lengths
        ]
        for depth in depths
    ]
    image = panel.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    names = [short_length(length) for length in lengths]
    panel.set_xticks(range(len(lengths)), names, fontsize=6)
    panel.set_yticks(range(len(depths)), [str(depth) for depth in depths], fontsize=6)
    return image


def _color(method: str) -> str:
    """Return the color of a method, the same in every panel."""
    return COLORS[[*METHODS].index(method) % len(COLORS)]


def _legend(figure, panels) -> None:
    """Put one legend above the panels, where it hides no data."""
    entries: dict = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4, fontsize=8)


def _methods(comparison: Comparison, rope: str) -> list[str]:
    """Return the methods that were run with a RoPE."""
    return [method for method in comparison.methods if comparison.runs(method, rope)]


def _figure(columns: int):
    """Return a figure with one row of panels, and the panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5.2 * columns, 4.6)
    figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, axes[0]
