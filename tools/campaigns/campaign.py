"""What all campaigns share: their arguments, their limits, and the processes that try the cases."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalard import cli
from megalard.errors import UserError
from tools.campaigns.mutations import remove
from tools.campaigns.tally import Outcome, Tally
from tools.campaigns.workers import Try, outcomes_of


def _nothing(*arguments: Any) -> None:
    return None


@dataclass(frozen=True)
class Campaign:
    """A campaign: how its cases are prepared and tried.

    Attributes:
        description: the docstring of the campaign.
        count: the default number of cases.
        try_case: tries the case of a seed, given the seed, the material, an empty folder and the
            parsed arguments. It runs in a forked process.
        prepare: makes the material in a folder, given the parsed arguments, before the processes
            are forked.
        begin: is called once in each process.
        add_arguments: declares arguments beyond those that every campaign has.
    """

    description: str | None
    count: int
    try_case: Callable[[int, Any, Path, argparse.Namespace], Iterable[Outcome]]
    prepare: Callable[[Path, argparse.Namespace], Any] = _nothing
    begin: Callable[[], None] = _nothing
    add_arguments: Callable[[argparse.ArgumentParser], None] = _nothing

    def main(self, arguments: list[str] | None) -> int:
        """Parse the arguments, run the campaign, and return the exit status."""
        parser = cli.Parser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--count", type=int, default=self.count, help=f"cases ({self.count})")
        parser.add_argument("--seed", type=int, default=0, help="seed of the first case (0)")
        parser.add_argument(
            "--minutes", type=float, default=0.0, help="begin no case after this time (no limit)"
        )
        parser.add_argument("--jobs", type=int, default=1, help="processes that try cases (1)")
        parser.add_argument("--json", type=Path, help="write the counts to this file as well")
        self.add_arguments(parser)
        options = parser.parse_args(arguments)
        if options.jobs < 1:
            parser.error(f"--jobs {options.jobs}: give at least 1")
        return cli.run(lambda: self._run(options))

    def _run(self, options: argparse.Namespace) -> int:
        tally = Tally()
        with tempfile.TemporaryDirectory(prefix="megalard-campaign-") as name:
            material = self.prepare(Path(name, "material"), options)

            def begin(number: int) -> Try:
                folder = Path(name, f"process-{number}")
                folder.mkdir(exist_ok=True)
                os.chdir(folder)  # cases that name ``x`` make it here
                self.begin()

                def attempt(seed: int) -> Iterable[Outcome]:
                    scratch = folder / "scratch"
                    remove(scratch)
                    scratch.mkdir()
                    return self.try_case(seed, material, scratch, options)

                return attempt

            seeds = range(options.seed, options.seed + options.count)
            for seed, outcomes in outcomes_of(seeds, begin, options.jobs, options.minutes):
                for outcome in outcomes:
                    tally.add(seed, outcome)
        if options.json is not None:
            facts = {"command": sys.argv, "seed": options.seed}
            try:
                tally.write(options.json, facts)
            except OSError as error:
                raise UserError(f"cannot write {options.json}: {error.strerror}") from None
        return tally.report()
