"""The report of the study: tables in Markdown, the same numbers as JSON, and plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from megalard.errors import UserError
from tools.study.comparison import IN, OUT, SHARES, Comparison, Measured
from tools.study.lengths import NATIVE_WINDOW, STUDENT_WINDOW
from tools.study.methods import METHODS
from tools.study.plots import ROPE_NAMES, plot_curves, plot_passkey, plot_positions

PLACES = {"in_domain": IN, "out_of_domain": OUT}


def write_report(output: Path, results: list[dict], domain: str) -> None:
    """Print the tables, and write them with JSON and three plots into a directory.

    Args:
        results: as ``tools.study.results.reported`` returns them.
        domain: the domain of the text that students were trained on.

    Raises:
        UserError: a table lacks its baselines or its runs.
    """
    _check_complete(results, domain)
    comparison = Comparison(results, domain)
    output.mkdir(parents=True, exist_ok=True)
    tables = [table(comparison) for table in (short_table, long_table, tokens_table, cost_table)]
    (output / "restoration-tables.md").write_text("\n".join(tables))
    (output / "restoration.json").write_text(json.dumps(numbers(comparison), indent=1) + "\n")
    plot_curves(output / "restoration-tokens.png", comparison)
    plot_positions(output / "restoration-positions.png", comparison)
    plot_passkey(output / "restoration-passkey.png", comparison)
    print("\n".join(tables))


def _check_complete(results: list[dict], domain: str) -> None:
    baselines = {(r["method"], r["rope"]) for r in results if r["kind"] == "baseline"}
    finals = [result for result in results if result["kind"] == "final"]
    missing = {rope for rope in (r["rope"] for r in finals) if ("scaled", rope) not in baselines}
    if not finals or missing or "teacher" not in {method for method, _ in baselines}:
        raise UserError(
            "there are no results of final runs and their baselines to report: run the command "
            "final first"
        )
    if domain not in finals[0]["compared"]["domains"]:
        names = ", ".join(sorted(finals[0]["compared"]["domains"]))
        raise UserError(f"--domain is {domain}, and the results are of {names}: choose one of them")


def short_table(comparison: Comparison) -> str:
    """Return the table of short text."""
    headings = ["", "tokens", "rate"]
    columns: list[tuple[Callable[[Measured, str], float], int]] = []
    for where in (IN, OUT):
        headings += [f"gap restored, {where}", f"score kept, {where}"]
        columns += [
            (lambda m, rope, w=where: comparison.restored(m, rope, w), 3),
            (lambda m, rope, w=where: comparison.score_kept(m, w), 3),
        ]
    headings += ["KL to teacher, out", "same top-1, out"]
    columns += [
        (lambda m, rope, f=field: comparison.short_mean(m, OUT, f), 4)
        for field in ("kl", "agreement")
    ]
    rows = []
    for rope, method, label in _rows(comparison):
        if method is None:
            scaled = comparison.scaled(rope)
            cells = [f"{number(scaled, rope):.4f}" for number, _ in columns]
            cells[0] = cells[2] = "0"  # by definition it has restored nothing of the gap
            rows.append([label, "0", "", *cells])
            continue
        cells = [_cell(comparison, method, rope, number, digits) for number, digits in columns]
        rate = comparison.runs(method, rope)[0]["rate"]
        rows.append([label, _tokens(METHODS[method].compared_at), f"{rate:g}", *cells])
    return _table(f"Short text (up to M = {NATIVE_WINDOW} tokens)", headings, rows)


def long_table(comparison: Comparison) -> str:
    """Return the table of long text and retrieval."""
    tasks = list(comparison.teacher["tasks"])
    headings = [
        "",
        "tokens",
        f"loss at {STUDENT_WINDOW}, in",
        f"loss at {STUDENT_WINDOW}, out",
        "loss of the last eighth, out",
        *(f"{task}, {where} M" for task in tasks for where in ("within", "beyond")),
    ]
    columns: list[Callable[[Measured], float]] = [
        lambda m: comparison.long_loss(m, IN),
        lambda m: comparison.long_loss(m, OUT),
        lambda m: comparison.far_loss(m, OUT),
        *(
            lambda m, t=task, b=beyond: comparison.exact(m, t, b)
            for task in tasks
            for beyond in (False, True)
        ),
    ]
    rows = [["teacher", "", *(f"{number(comparison.teacher):.3f}" for number in columns)]]
    for rope, method, label in _rows(comparison):
        if method is None:
            scaled = comparison.scaled(rope)
            rows.append([label, "0", *(f"{number(scaled):.3f}" for number in columns)])
            continue
        cells = [comparison.over_seeds(method, rope, number).text(3) for number in columns]
        rows.append([label, _tokens(METHODS[method].compared_at), *cells])
    return _table(f"Long text (up to f M = {STUDENT_WINDOW} tokens)", headings, rows)


def tokens_table(comparison: Comparison) -> str:
    """Return the table of the training tokens that a share of the gap takes."""
    headings = ["", "read in all"]
    headings += [f"{share:.1%} of the gap, {where}" for where in (IN, OUT) for share in SHARES]
    rows = []
    for rope, method, label in _rows(comparison):
        if method is None:
            continue
        needed = [
            _tokens(comparison.tokens_needed(method, rope, where, share))
            for where in (IN, OUT)
            for share in SHARES
        ]
        rows.append([label, _tokens(METHODS[method].tokens), *needed])
    return _table("Training tokens needed", headings, rows)


def cost_table(comparison: Comparison) -> str:
    """Return the table of time and memory."""
    headings = ["", "tokens per step", "ms per step", "tokens/s", "peak memory, GiB", "time, s"]
    rows = []
    for method, timing in comparison.timings.items():
        seconds, tokens = timing["seconds_per_step"], timing["tokens_per_step"]
        total = METHODS[method].compared_at / tokens * seconds
        rows.append(
            [
                METHODS[method].label,
                f"{tokens:,}",
                f"{seconds * 1e3:.1f}",
                f"{tokens / seconds:,.0f}",
                f"{timing['peak_memory'] / 2**30:.2f}",
                f"{total:.1f}",
            ]
        )
    return _table("Cost, one run at a time on the device", headings, rows)


def numbers(comparison: Comparison) -> dict:
    """Return the numbers of the tables and the curves, for other programs."""
    entries = {}
    for rope, method, _ in _rows(comparison):
        if method is None:
            continue
        rate = comparison.runs(method, rope)[0]["rate"]
        entry: dict = {"rate": rate, "tokens": METHODS[method].compared_at}
        for key, where in PLACES.items():
            tokens, shares = comparison.curve(method, rope, where)
            columns: dict[str, Callable[[Measured], float]] = {
                "restored": lambda m, r=rope, w=where: comparison.restored(m, r, w),
                "score_kept": lambda m, w=where: comparison.score_kept(m, w),
                "long_loss": lambda m, w=where: comparison.long_loss(m, w),
            }
            entry[key] = {
                name: asdict(comparison.over_seeds(method, rope, number))
                for name, number in columns.items()
            }
            entry[key]["curve"] = [
                [count, share.mean] for count, share in zip(tokens, shares, strict=True)
            ]
        entries[f"{rope}/{method}"] = entry
    return entries


def _rows(comparison: Comparison) -> Iterator[tuple[str, str | None, str]]:
    """Yield RoPE, method and label of each row; the method of the scaled student is None."""
    for rope in comparison.ropes:
        yield rope, None, f"{ROPE_NAMES[rope]}, not restored"
        for method in comparison.methods:
            if comparison.runs(method, rope):
                yield rope, method, f"{ROPE_NAMES[rope]}, {METHODS[method].label}"


def _cell(
    comparison: Comparison,
    method: str,
    rope: str,
    number: Callable[[Measured, str], float],
    digits: int,
) -> str:
    return comparison.over_seeds(method, rope, lambda m: number(m, rope)).text(digits)


def _table(title: str, headings: list[str], rows: list[list[str]]) -> str:
    lines = [f"### {title}\n", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _tokens(count: float | None) -> str:
    if count is None:
        return "not reached"
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
