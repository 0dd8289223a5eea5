"""Put several restorations of one model side by side: one table, one JSON file, one plot.

    python tools/compare_runs.py RUN [RUN ...] --output DIR

Each RUN is an output directory of megalard.train that was evaluated. The teacher and the scaled
student are taken from the first and must be the same in all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalard.errors import UserError
from megalard.evaluation.report import (
    ModelResult,
    gap_restored,
    plot,
    print_table,
    read_json,
    write_json,
)


def collect(runs: list[Path]) -> tuple[list[ModelResult], int, float]:
    """Teacher, scaled student, and each run's restored student under the run's name.

    Raises:
        UserError: a run has no evaluation, or was evaluated on something else than the first.
    """
    combined: list[ModelResult] = []
    for run in runs:
        file = run / "evaluation.json"
        if not file.is_file():
            raise UserError(f"{run} has no evaluation.json: give evaluation.paths to the run")
        results, native, factor = read_json(file)
        if not combined:
            combined, first = results[:2], (native, factor)
        same = all(
            ours.by_length.keys() == theirs.by_length.keys()
            and all(
                abs(m.loss - theirs.by_length[n].loss) < 1e-3 for n, m in ours.by_length.items()
            )
            for ours, theirs in zip(results[:2], combined, strict=False)
        )
        if (native, factor) != first or not same:
            raise UserError(f"{run} restored another model or was evaluated on other text")
        results[2].name = run.name
        combined.append(results[2])
    return combined, *first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output of a run")
    parser.add_argument(
        "--output", type=Path, required=True, help="where comparison.json and .png are written"
    )
    options = parser.parse_args()
    try:
        results, native, factor = collect(options.runs)
    except UserError as error:
        print(f"megalard: error: {error}", file=sys.stderr)
        sys.exit(1)
    options.output.mkdir(parents=True, exist_ok=True)
    print_table(results, native)
    write_json(options.output / "comparison.json", results, native, factor)
    plot(options.output / "comparison.png", results, native)
    teacher, scaled, *restored = results
    for result in restored:
        share = gap_restored(result, teacher, scaled, native)
        told = (
            "no short-text gap" if share is None else f"{share:.0%} of the short-text gap restored"
        )
        print(f"{result.name}: {told} with {result.tokens:,} tokens")
    for result in restored:
        model = options.output / result.name / "student"
        if model.is_dir():
            print(f"restored model ({result.name}): {model}")
    print(f"plot: {options.output / 'comparison.png'}")


if __name__ == "__main__":
    main()
