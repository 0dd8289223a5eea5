"""Compare the estimates of ``megalard plan`` with every step that was measured.

    python -m tools.bench.planned            print the tables
    python -m tools.bench.planned --write    update the tables in docs/planning.md

The measurements are the files of ``tools.bench.step`` in docs/figures, and the results of the
studies in docs/figures/restoration. Each file is read as it was recorded, with the names that its
version of the benchmark used.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from megalard import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "planning.md"


def main(arguments: list[str] | None = None) -> int:
    """Print or write the tables; return the exit status."""
    parser = cli.Parser(
        prog="python -m tools.bench.planned",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="update the tables in the page")
    options = parser.parse_args(arguments)
    return cli.run(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Print or write the tables."""
    if options.write:
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, table in tables().items():
        print(f"{name}:\n{table}\n")


def tables() -> dict[str, str]:
    """Return the tables of the page, by name."""
    from tools.bench.planned_state import state_rows
    from tools.bench.planned_steps import bench_rows, study_rows

    return {
        "steps": _table(
            ("measurement", "tokens", "layout", "again", "offload", "GiB", "estimate", "difference",
             "s", "estimate", "difference"),
            [row.cells() for row in bench_rows()],
        ),
        "state": _table(
            ("measurement", "state", "GiB between steps", "estimate", "GiB", "estimate",
             "difference", "update, s", "estimate", "difference", "passes, s", "estimate",
             "difference"),
            [row.cells() for row in state_rows()],
        ),
        "studies": _table(
            ("model, method", "tokens per micro-batch", "again", "GiB", "estimate", "difference"),
            [row.memory_cells() for row in study_rows()],
        ),
    }  # fmt: skip


def renewed(text: str) -> str:
    """Return the text of the page with its tables made again."""
    for name, table in tables().items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text,
                      flags=re.DOTALL)  # fmt: skip
    return text


def _table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
