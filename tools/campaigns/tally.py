"""The parts that all campaigns share: arguments, limits, progress, and the count of outcomes."""

from __future__ import annotations

import argparse
import collections
import sys
import time
from collections.abc import Callable, Iterator

from megalard import cli

_PROGRESS_S = 10.0


class Tally:
    """The outcomes of a campaign.

    Attributes:
        counts: the number of each kind of outcome.
        num_bad: the number of outcomes that are not good.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.num_bad = 0

    def add(self, kind: str, is_good: bool, case: str, detail: str = "") -> None:
        """Count an outcome, and print it if it is not good."""
        self.counts[kind] += 1
        if not is_good:
            self.num_bad += 1
            print(f"{kind}: {case!s}: {detail}".encode("unicode_escape").decode(), flush=True)

    def report(self) -> int:
        """Print the counts; return the exit status."""
        for kind, number in self.counts.most_common():
            print(f"{number:8d} {kind}")
        total = sum(self.counts.values())
        print(f"{total:8d} cases, of which {self.num_bad} are not as they should be")
        return 1 if self.num_bad else 0


def numbers(options: argparse.Namespace, tally: Tally) -> Iterator[int]:
    """Yield the numbers of the cases until their count or the time is reached; show progress."""
    start = shown = time.monotonic()
    for number in range(options.seed, options.seed + options.count):
        now = time.monotonic()
        if options.minutes and now - start > 60 * options.minutes:
            print(f"stopped before seed {number}, after {options.minutes:g} minutes")
            return
        if now - shown > _PROGRESS_S:
            shown = now
            num_cases = number - options.seed
            print(f"{num_cases} cases in {now - start:.0f} s, {tally.num_bad} bad", file=sys.stderr)
        yield number


def main_of(
    description: str | None,
    run: Callable[[argparse.Namespace], int],
    count: int,
    arguments: list[str] | None,
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> int:
    """Parse the arguments that every campaign has, run it, and return the exit status.

    Args:
        description: the docstring of the campaign.
        run: runs the campaign with the parsed arguments.
        count: the default number of cases.
        add_arguments: declares further arguments.
    """
    parser = cli.Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=count, help=f"cases ({count})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case (0)")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="stop after these many minutes (no limit)"
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    return cli.run(lambda: run(options))
