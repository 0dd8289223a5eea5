"""Show several restorations of one model next to each other: one table, one JSON file, one plot.

    python tools/compare_runs.py RUN [RUN ...] --output DIR

Each RUN is the output directory of a training run that was evaluated. The teacher and the scaled
student are taken from the first run, and must be the same in all runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalard import cli
from megalard.errors import UserError
from megalard.evaluation.plots import draw
from megalard.evaluation.report import Entry, Restoration, print_tables, read_json, write_json


def collect(runs: list[Path]) -> tuple[list[Entry], Restoration]:
    """Return teacher, scaled student, and each run's restored student under the name of the run.

    Raises:
        UserError: a run has no evaluation, or was evaluated on other text than the first run.
    """
    entries: list[Entry] = []
    for run in runs:
        file = run / "evaluation.json"
        if not file.is_file():
            raise UserError(f"{run} has no evaluation.json: give evaluation.paths to the run")
        run_entries, restoration = read_json(file)
        if not entries:
            entries, first_restoration = run_entries[:2], restoration
        is_same = restoration == first_restoration and all(
            _is_same(entry, expected)
            for entry, expected in zip(run_entries, entries[:2], strict=False)
        )
        if not is_same:
            raise UserError(
                f"{run} restored another model than {runs[0]}, or was evaluated on other text: "
                "compare runs with the same teacher, RoPE and held-out text"
            )
        run_entries[-1].name = run.name
        entries.append(run_entries[-1])
    return entries, first_restoration


def _is_same(a: Entry, b: Entry) -> bool:
    by_length, other = a.results.by_length, b.results.by_length
    return by_length.keys() == other.keys() and all(
        abs(m.loss - other[n].loss) < 1e-3 for n, m in by_length.items()
    )


def main(arguments: list[str] | None = None) -> int:
    """Compare the runs that the arguments name; return the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output of a run")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="where comparison.json and comparison.png are written",
    )
    options = parser.parse_args(arguments)
    return cli.run(lambda: compare(options.runs, options.output))


def compare(runs: list[Path], output: Path) -> None:
    """Print, write and draw the comparison."""
    entries, restoration = collect(runs)
    output.mkdir(parents=True, exist_ok=True)
    print_tables(entries, restoration)
    settings = {"runs": [str(run) for run in runs]}
    write_json(output / "comparison.json", entries, settings, restoration)
    draw(output / "comparison.png", entries, restoration)
    for entry in entries[2:]:
        share = restoration.gap_restored(entry, entries)
        gap = (
            "no short-text gap" if share is None else f"{share:.0%} of the short-text gap restored"
        )
        longest = max(entry.results.by_length)
        teacher, restored = (e.results.by_length[longest].perplexity for e in (entries[0], entry))
        print(
            f"{entry.name}: {gap} with {entry.tokens:,} tokens; perplexity at {longest} tokens "
            f"{restored:.1f} (teacher {teacher:.1f})"
        )
    for entry in entries[2:]:
        model = output / entry.name / "student"
        if model.is_dir():
            print(f"restored model ({entry.name}): {_from_here(model)}")
    print(f"plot: {_from_here(output / 'comparison.png')}")


def _from_here(path: Path) -> Path:
    """Return a path relative to the current directory, if it is inside."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
