"""Restore a pre-trained model by every method, with one or both stages and equal numbers of tokens.

STUDY/teacher is a Hugging Face directory of a model with its native RoPE. The commands, in order:

  python -m tools.study.pretrained.corpus --model STUDY/teacher --output STUDY/corpus ...
  python -m tools.study.pretrained.choice_files --output STUDY/choices ...
  python -m tools.study.pretrained.study search STUDY    learning rates of each stage, by validation
  python -m tools.study.pretrained.study final STUDY     the runs of a plan, and the baselines
  python -m tools.study.pretrained.study report STUDY    tables

A command that was stopped continues where it was if it is given again: results are appended to
STUDY/results.jsonl as they come, and a run that has a result there is not repeated. A rate that was
searched for one factor serves for all. docs/restoration.md has the results.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

from megalard import cli
from megalard.errors import UserError
from tools import command_line
from tools.study.pretrained.methods import METHODS, STAGES

ROPES = ("linear", "yarn")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    options = parse(arguments)
    return cli.run(lambda: STEPS[options.step](options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_line.make_parser("tools.study.pretrained.study", __doc__)
    at_least = command_line.at_least
    parser.add_argument("step", choices=list(STEPS), help="see above")
    parser.add_argument("folder", type=Path, metavar="STUDY", help="directory of the study")
    parser.add_argument(
        "--domain", default="manuals", metavar="NAME", help="the text that restores the student"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"methods to run: {', '.join(METHODS)}; search tries their stages",
    )
    parser.add_argument(
        "--ropes", nargs="+", choices=ROPES, default=ROPES, metavar="TYPE", help="types of RoPE"
    )
    parser.add_argument(
        "--factors", nargs="+", type=at_least(2), default=[4], metavar="F", help="factors of RoPE"
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=at_least(1),
        default=[4_250_000],
        metavar="N",
        help="training tokens of all stages together; search reads the first number",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=command_line.above(0, float),
        metavar="RATE",
        help="final: one learning rate per stage, in place of those that search found best",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=at_least(0), default=[1], metavar="N", help="final: seeds"
    )
    parser.add_argument(
        "--questions", type=at_least(1), metavar="N", help="questions per task (default: all)"
    )
    command_line.add_seconds(parser)
    command_line.add_workers(parser, 1, "run at the same time and take the GPUs in turn")
    command_line.add_device(parser)
    command_line.add_output(
        parser, "report: where tables are written; STUDY when not given", required=False
    )
    return parser.parse_args(arguments)


def search(options: argparse.Namespace) -> None:
    """Try every learning rate of every stage."""
    from tools.study.pretrained.run import Run

    stages = dict.fromkeys(stage for name in options.methods for stage in METHODS[name].stages)
    runs = [
        Run("search", stage, rope, factor, options.tokens[0], (rate,))
        for stage in stages
        for rope in options.ropes
        for factor in options.factors
        for rate in STAGES[stage].rates
    ]
    _run_all(options, runs)


def final(options: argparse.Namespace) -> None:
    """Run every method at the best rate of each stage, and measure the baselines."""
    from tools.study.pretrained.report import best_rates
    from tools.study.pretrained.run import Run
    from tools.study.results import read_results

    results = read_results(options.folder)
    runs = [Run("baseline", "teacher", options.ropes[0], f) for f in options.factors]
    runs += [Run("baseline", "scaled", rope, f) for rope in options.ropes for f in options.factors]
    for name in options.methods:
        stages = METHODS[name].stages
        if options.rates and len(options.rates) != len(stages):
            raise UserError(
                f"{name} has {len(stages)} stages, and --rates gives {len(options.rates)} rates: "
                "give one rate per stage, or choose other --methods"
            )
        for rope in options.ropes:
            rates = tuple(options.rates or best_rates(results, METHODS[name], rope))
            runs += [
                Run("final", name, rope, factor, tokens, rates, seed)
                for factor in options.factors
                for tokens in options.tokens
                for seed in options.seeds
            ]
    _run_all(options, runs)


def report(options: argparse.Namespace) -> None:
    """Write the tables."""
    from tools.study.pretrained.report import write_report
    from tools.study.results import read_results

    write_report(options.output or options.folder, read_results(options.folder), options.domain)


def _run_all(options: argparse.Namespace, runs: list) -> None:
    from tools.study.pool import run_all
    from tools.study.pretrained.folder import Study
    from tools.study.pretrained.run import execute

    for needed in (Path("teacher") / "config.json", Path("corpus") / options.domain / "train"):
        if not (options.folder / needed).exists():
            raise UserError(f"{options.folder} has no {needed}: --help says how to make it")
    opened = partial(
        Study, options.folder, options.domain, options.device, questions=options.questions
    )
    seconds = math.inf if options.seconds is None else options.seconds
    run_all(options.step, runs, options.folder, opened, execute, options.workers, seconds)


STEPS = {"search": search, "final": final, "report": report}

if __name__ == "__main__":
    sys.exit(main())
