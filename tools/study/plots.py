"""The plots of the study's report."""

from __future__ import annotations

import itertools
from pathlib import Path

from tools.study.comparison import OUT, SHARES, Comparison, Measured
from tools.study.lengths import EDGES, FACTOR, NATIVE_WINDOW, TASK_LENGTHS
from tools.study.methods import METHODS

ROPE_NAMES = {"linear": "PI", "yarn": "YaRN"}
_DPI = 130


def plot_curves(path: Path, comparison: Comparison) -> None:
    """Draw the share of the short-text gap restored out of the training domain, by tokens."""
    figure, panels = _figure(len(comparison.ropes))
    for panel, rope in zip(panels, comparison.ropes, strict=True):
        all_tokens: list[int] = []
        for method in _methods(comparison, rope):
            tokens, shares = comparison.curve(method, rope, OUT)
            all_tokens += tokens
            means = [share.mean for share in shares]
            (line,) = panel.plot(tokens, means, marker=".", label=METHODS[method].label)
            low = [share.mean - share.farthest for share in shares]
            high = [share.mean + share.farthest for share in shares]
            panel.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15)
        for share in SHARES:
            panel.axhline(share, color="grey", linestyle=":", linewidth=0.8)
        panel.set_xscale("log")
        # Given, because there is no share to draw where scaling has opened no gap.
        panel.set_xlim(0.8 * min(all_tokens), 1.25 * max(all_tokens))
        panel.set_ylim(-0.1, 1.05)
        panel.set_xlabel("training tokens")
        panel.set_title(f"{ROPE_NAMES[rope]} x {FACTOR}")
    panels[0].set_ylabel("short-text gap restored,\nout of the training domain")
    panels[-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=_DPI)


def plot_positions(path: Path, comparison: Comparison) -> None:
    """Draw the loss by position in windows of f M tokens, out of the training domain."""
    figure, panels = _figure(len(comparison.ropes))
    middles = [(start + end) / 2 for start, end in itertools.pairwise(EDGES)]

    def losses(measured: Measured) -> list[float]:
        return [m.loss for m in comparison.entry(measured, OUT).results.by_position]

    for panel, rope in zip(panels, comparison.ropes, strict=True):
        panel.plot(middles, losses(comparison.teacher), "k--", label="teacher")
        panel.plot(middles, losses(comparison.scaled(rope)), "k:", label="not restored")
        for method in _methods(comparison, rope):
            runs = [losses(run["compared"]) for run in comparison.runs(method, rope)]
            means = [sum(column) / len(column) for column in zip(*runs, strict=True)]
            panel.plot(middles, means, marker=".", label=METHODS[method].label)
        panel.axvline(NATIVE_WINDOW, color="grey", linewidth=0.8)
        panel.set_title(f"{ROPE_NAMES[rope]} x {FACTOR}")
        panel.set_xlabel("position")
        panel.set_yscale("log")
    panels[0].set_ylabel("loss, nats")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=_DPI)


def plot_passkey(path: Path, comparison: Comparison) -> None:
    """Draw how many passkeys are answered by depth and length, for the first RoPE."""
    rope = comparison.ropes[0]
    models = [("teacher", [comparison.teacher]), ("not restored", [comparison.scaled(rope)])]
    for method in _methods(comparison, rope):
        runs = [run["compared"] for run in comparison.runs(method, rope)]
        models.append((METHODS[method].label, runs))
    figure, panels = _figure(len(models))
    figure.set_size_inches(2.1 * len(models), 2.8)
    for panel, (label, runs) in zip(panels, models, strict=True):
        results = [run["tasks"]["passkey"] for run in runs]
        lengths = [length for length in TASK_LENGTHS if str(length) in results[0]]
        depths = list(results[0][str(lengths[0])]["by_depth"])
        shares = [
            [
                sum(result[str(length)]["by_depth"][depth] for result in results) / len(results)
                for length in lengths
            ]
            for depth in depths
        ]
        panel.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_title(label, fontsize=8)
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=6)
        panel.set_yticks(range(len(depths)), [str(depth) for depth in depths], fontsize=6)
    panels[0].set_ylabel("depth", fontsize=7)
    figure.supxlabel(f"length; passkeys answered exactly, {ROPE_NAMES[rope]}", fontsize=8)
    figure.savefig(path, dpi=_DPI)


def _methods(comparison: Comparison, rope: str) -> list[str]:
    """Return the methods that were run with a RoPE."""
    return [method for method in comparison.methods if comparison.runs(method, rope)]


def _figure(columns: int):
    """Return a figure with one row of panels, and the panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5.2 * columns, 4.2)
    figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, axes[0]
