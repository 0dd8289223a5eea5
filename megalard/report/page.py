"""Render the report of a run as one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from megalard import __version__
from megalard.errors import reason_of
from megalard.evaluation.plots import draw
from megalard.files.writing import replace_text
from megalard.report.collect import RunRecord, collect
from megalard.report.figures import curves, heat_map, rope_curves, validation_curves

REPORT = "report.html"
DAMAGED = "This section cannot be shown"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; border-bottom: 1px solid #e4e4e4; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } p.note { color: #555; } code { font-size: .92em; }
"""

# Settings that are shown in short: the others are in run.json. Every stage, and every stream, has
# values for its part of them, and those of the run have no effect then.
_OF_STREAM = ("data.paths", "data.context_length", "global_batch")
_REPLACED_BY_STREAMS = ("data.paths", "data.context_length", "optimizer.global_batch")
_OF_STAGE = (
    "trainable.mode",
    "data.paths",
    "data.context_length",
    "optimizer.steps",
    "optimizer.learning_rate",
    "optimizer.global_batch",
)
_OF_RUN = (
    "model.teacher",
    "model.student",
    "rope.type",
    "rope.factor",
    "parallel.tp",
    "parallel.cp",
    "run.seed",
    *_OF_STAGE,
)


def write_report(directory: Path) -> Path:
    """Write ``report.html`` into the output directory of a run, and return its path.

    Raises:
        UserError: the directory is not the output directory of a run.
        OSError: the file cannot be written.
    """
    path = directory / REPORT
    replace_text(path, render(collect(directory)))
    return path


def render(record: RunRecord) -> str:
    """Return the page."""
    name = record.directory.absolute().name
    sections = [
        (title, _unless_damaged(make, record))
        for title, make in (
            ("Result", _result),
            ("Configuration", _configuration),
            ("Evaluation", _evaluation),
            ("Validation during the run", _validation),
            ("Training", _training),
            ("Loss by layer", _layers),
            ("RoPE", _rope),
            ("Cost", _cost),
        )
    ]
    body = "".join(f"<h2>{escape(title)}</h2>\n{text}\n" for title, text in sections if text)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(name)}</h1>\n{body}"
        f'<p class="note">megalard {escape(__version__)}</p>\n</body>\n</html>\n'
    )


def _unless_damaged(make: Callable[[RunRecord], str], record: RunRecord) -> str:
    """Return a section, or a note in its place if the files have values that do not fit it."""
    try:
        return make(record)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = escape(reason_of(error))
        return f'<p class="note">{DAMAGED}: a file of the run is damaged ({reason}).</p>'


def _validation(record: RunRecord) -> str:
    return _picture(validation_curves(record), "validation")


def _training(record: RunRecord) -> str:
    return _picture(curves(record), "curves of the training")


def _result(record: RunRecord) -> str:
    """Return in sentences how far the run is and what it restored."""
    summary, lines = record.summary, []
    steps = record.steps[-1]["step"] if record.steps else 0
    total = summary.get("steps", "?")
    if not summary:
        lines.append(f"The run has not ended. Its last report is of step {steps}.")
    elif summary.get("early_stop"):
        lines.append(f"The run ended early, after step {summary.get('last_step')} of {total}.")
    else:
        lines.append(f"The run has taken all of its {total} steps.")
    exported = summary.get("exported_step")
    if exported is not None and exported != summary.get("last_step"):
        lines.append(f"The student of step {exported} is exported: its validation was the best.")
    if summary.get("skipped"):
        lines.append(f"{summary['skipped']} steps changed nothing.")
    if record.restoration is not None and len(record.entries) > 2:
        share = record.restoration.gap_restored(record.entries[-1], record.entries)
        if share is not None:
            lines.append(
                f"{share:.1%} of the short-text gap was restored with "
                f"{record.entries[-1].tokens:,} tokens."
            )
    return f"<p>{escape(' '.join(lines))}</p>"


def _configuration(record: RunRecord) -> str:
    rows = _setting_rows(record.settings, _OF_RUN)
    window = record.summary.get("rope") or {}
    if window:
        rows.append(["window", f"{window.get('native_window')} to {window.get('window')} tokens"])
    return _table(["setting", "value"], rows) if rows else ""


def _setting_rows(settings: Mapping, keys: Sequence[str], prefix: str = "") -> list[list[str]]:
    """Return keys and values that have an effect: those of stages and streams where there are any.

    Args:
        settings: those of the run, a stage or a stream.
        keys: the keys of these settings that are shown.
        prefix: the place of these settings in the run's.
    """
    stages, streams = settings.get("stages") or {}, settings.get("streams") or {}
    replaced = _OF_STAGE if stages else _REPLACED_BY_STREAMS if streams else ()
    flat, rows = _flat(settings), []
    for key in keys:
        if key not in replaced and flat.get(key) not in (None, "", []):
            rows.append([prefix + key, _short(flat[key])])
    for group, entries, shown in (
        ("stages", stages, _OF_STAGE),
        ("streams", {} if stages else streams, _OF_STREAM),
    ):
        for name, entry in entries.items():
            rows += _setting_rows(entry, shown, f"{prefix}{group}.{name}.")
    return rows


def _evaluation(record: RunRecord) -> str:
    entries, restoration = record.entries, record.restoration
    if not entries or restoration is None:
        return '<p class="note">Nothing was evaluated: the run had no held-out text.</p>'
    lengths = sorted(entries[0].results.by_length)
    heads = ["perplexity at", *map(str, lengths), "gap restored", "KL to teacher", "same top-1"]
    rows = []
    for number, entry in enumerate(entries):
        share = restoration.gap_restored(entry, entries) if number >= 2 else None
        means = [entry.short_mean(key, restoration.native_window) for key in ("kl", "agreement")]
        by_length = entry.results.by_length
        cells = [f"{by_length[n].perplexity:.3f}" if n in by_length else "" for n in lengths]
        cells += ["" if x is None else f"{x:.3f}" for x in (share, *means)]
        rows.append([entry.name, *cells, f"{entry.tokens:,}" if entry.tokens else ""])
    buffer = io.BytesIO()
    draw(buffer, entries, restoration)
    picture = _picture(buffer.getvalue(), "perplexity and agreement by length")
    return _table([*heads, "tokens"], rows) + picture


def _layers(record: RunRecord) -> str:
    losses = record.layer_losses()
    if not losses:
        return ""
    rows = []
    for part in losses:
        pairs = [
            (layer, a, b)
            for layer, (a, b) in enumerate(zip(part.first, part.last, strict=True))
            if a is not None and b is not None
        ]
        if pairs:
            layer, first, last = max(pairs, key=lambda pair: pair[1])
            rows.append([part.part, str(layer), f"{first:.4g}", f"{last:.4g}"])
    note = (
        '<p class="note">Which layers scaling hurt (first report), and what restoration did (last '
        "report). The table has the layer with the largest loss in the first report.</p>"
    )
    table = _table(["part", "layer", "first report", "last report"], rows)
    return note + _picture(heat_map(losses), "loss by layer and part") + table


def _rope(record: RunRecord) -> str:
    rope = record.summary.get("rope") or {}
    teacher, student = rope.get("teacher") or [], rope.get("student") or []
    if not teacher:
        return ""
    shown = sorted({round(i * (len(teacher) - 1) / 7) for i in range(8)})
    rows = [
        [str(i), f"{1 / teacher[i]:.6g}", f"{1 / student[i]:.6g}", f"{teacher[i] / student[i]:.4f}"]
        for i in shown
    ]
    heads = ["pair", "teacher 1/frequency", "student 1/frequency", "ratio"]
    return _picture(rope_curves(teacher, student), "RoPE frequencies") + _table(heads, rows)


def _cost(record: RunRecord) -> str:
    cost, summary = record.cost(), record.summary
    hours, rest = divmod(round(cost.seconds), 3600)
    rows = [
        ["time of the steps", f"{hours}:{rest // 60:02}:{rest % 60:02}"],
        ["tokens", f"{cost.tokens:,}"],
        ["tokens per second", f"{cost.tokens_per_second:,.0f}"],
    ]
    if cost.peak_gib is not None:
        rows.append(["peak memory of rank 0", f"{cost.peak_gib:.2f} GiB"])
    if cost.ranks:
        layout = " x ".join(f"{axis} {summary[axis]}" for axis in ("dp", "cp", "tp"))
        rows.append(["ranks", f"{cost.ranks} x {summary['device']} ({layout})"])
        rows.append(["device hours", f"{cost.seconds * cost.ranks / 3600:.2f}"])
    note = '<p class="note">Without the time of evaluation, saving and exports.</p>'
    return _table(["", ""], rows) + note


def _picture(content: bytes | None, description: str) -> str:
    """Return an image that is part of the page."""
    if content is None:
        return ""
    kind = "png" if content.startswith(b"\x89PNG") else "svg+xml"
    data = base64.b64encode(content).decode()
    return f'<p><img alt="{escape(description)}" src="data:image/{kind};base64,{data}"></p>\n'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    head = row("th", heads) if any(heads) else ""
    return f"<table>\n{head}{''.join(row('td', cells) for cells in rows)}</table>\n"


def _flat(tree: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        is_section = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
