"""The evaluation of several models side by side: one table, one JSON file, one plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megalard.evaluation.measure import Measurement


@dataclass
class ModelResult:
    """One row of the table.

    Attributes:
        name: what the row is called.
        tokens: tokens the restoration read; 0 for the teacher and the scaled student.
        by_length: context length to measurement.
    """

    name: str
    tokens: int
    by_length: dict[int, Measurement]

    def short_loss(self, native_context: int) -> float:
        """Mean loss over the measured lengths up to the native window."""
        short = [m.loss for length, m in self.by_length.items() if length <= native_context]
        return sum(short) / len(short) if short else float("nan")

    def short_mean(self, field: str, native_context: int) -> float | None:
        """Mean of kl or agreement over the lengths up to the native window."""
        values = [getattr(m, field) for n, m in self.by_length.items() if n <= native_context]
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None


def gap_restored(result: ModelResult, teacher: ModelResult, scaled: ModelResult, native: int):
    """(L_scaled - L) / (L_scaled - L_teacher) on short text; None where there is no gap."""
    gap = scaled.short_loss(native) - teacher.short_loss(native)
    return (scaled.short_loss(native) - result.short_loss(native)) / gap if gap > 0 else None


def print_table(results: list[ModelResult], native: int, console: Console | None = None) -> None:
    """Perplexity by length, share of the gap restored, KL and agreement at up to M tokens.

    ``results`` starts with the teacher and the scaled student.
    """
    teacher, scaled, *_ = results
    table = Table(title=f"Perplexity by context length (native window M = {native})")
    table.add_column("model")
    lengths = sorted(teacher.by_length)
    for length in lengths:
        table.add_column(str(length), justify="right")
    for heading in ("gap restored", "KL to teacher", "same top-1", "tokens"):
        table.add_column(heading, justify="right")
    for result in results:
        restored = gap_restored(result, teacher, scaled, native)
        kl = result.short_mean("kl", native)
        same = result.short_mean("agreement", native)
        table.add_row(
            result.name,
            *(f"{result.by_length[length].perplexity:.3f}" for length in lengths),
            "" if restored is None or result in (teacher, scaled) else f"{restored:.3f}",
            "" if kl is None else f"{kl:.4f}",
            "" if same is None else f"{same:.3f}",
            f"{result.tokens:,}" if result.tokens else "",
        )
    (console or Console(width=140)).print(table)


def write_json(path: Path, results: list[ModelResult], native: int, factor: float) -> None:
    """The results, readable back by ``read_json``."""
    teacher, scaled, *_ = results
    content = {
        "native_context": native,
        "factor": factor,
        "models": [
            {
                "name": result.name,
                "tokens": result.tokens,
                "gap_restored": gap_restored(result, teacher, scaled, native),
                "by_length": {
                    str(length): {**asdict(m), "perplexity": m.perplexity}
                    for length, m in sorted(result.by_length.items())
                },
            }
            for result in results
        ],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> tuple[list[ModelResult], int, float]:
    """Results, native window and factor of a file written by ``write_json``."""
    content = json.loads(path.read_text())
    results = [
        ModelResult(
            model["name"],
            model["tokens"],
            {
                int(length): Measurement(m["loss"], m["kl"], m["agreement"], m.get("accuracy"))
                for length, m in model["by_length"].items()
            },
        )
        for model in content["models"]
    ]
    return results, content["native_context"], content["factor"]


def plot(path: Path, results: list[ModelResult], native: int) -> None:
    """Perplexity against context length, one line a model, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for result in results:
        lengths = sorted(result.by_length)
        perplexity = [result.by_length[length].perplexity for length in lengths]
        axes.plot(lengths, perplexity, marker="o", label=result.name)
    axes.axvline(native, color="grey", linestyle=":", label=f"native window M = {native}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("perplexity")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
