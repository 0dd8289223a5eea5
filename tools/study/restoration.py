"""Compare restoration with continued pre-training on a small model: the study with a proxy.

A small Llama with a native window of 512 tokens, the teacher, is trained from scratch on several
domains of text. Its RoPE is scaled by 8, and every method of the study restores the student on text
of one domain. Short text inside and outside that domain, long text and retrieval are measured on
test files that nothing was trained on or chosen by. The commands, in order:

  python -m tools.study.corpus --output STUDY/corpus --native-window 512
  python -m tools.study.restoration pretrain STUDY     the teacher
  python -m tools.study.restoration search STUDY       learning rates, by validation text
  python -m tools.study.restoration final STUDY        every method, RoPE and seed
  python -m tools.study.restoration timing STUDY       time and memory of each method, alone
  python -m tools.study.restoration report STUDY       tables and plots

A command that was stopped continues where it was if it is given again: results are appended to
STUDY/results.jsonl as they come, and a run that has a result there is not repeated.
docs/restoration.md has the results.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from megalard import cli
from megalard.errors import UserError
from tools import command_line
from tools.study.lengths import ROPES
from tools.study.methods import METHODS


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    options = parse(arguments)
    return cli.run(lambda: COMMANDS[options.command](options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_line.make_parser("tools.study.restoration", __doc__)
    at_least = command_line.at_least
    parser.add_argument("command", choices=list(COMMANDS), help="the command to run; see above")
    parser.add_argument(
        "folder", type=Path, metavar="STUDY", help="directory of the study, which holds corpus/"
    )
    parser.add_argument(
        "--domain",
        default="python",
        metavar="NAME",
        help="the domain of text that restores the student",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help="the methods to run",
    )
    parser.add_argument(
        "--ropes",
        nargs="+",
        choices=ROPES,
        default=ROPES,
        metavar="TYPE",
        help="types of RoPE to scale by",
    )
    parser.add_argument(
        "--seeds", type=at_least(1), default=3, metavar="N", help="final: seeds of each run"
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=3000,
        metavar="N",
        help="pretrain: steps of 64 blocks of 512 tokens",
    )
    parser.add_argument(
        "--shrink",
        type=at_least(1),
        default=1,
        metavar="N",
        help="divide all steps, tokens and measurements by this, to try the study out",
    )
    command_line.add_seconds(parser)
    command_line.add_workers(parser, 1, "run at the same time and take the GPUs in turn")
    command_line.add_device(parser)
    command_line.add_output(
        parser, "report: where tables and plots are written; STUDY when not given", required=False
    )
    return parser.parse_args(arguments)


def pretrain(options: argparse.Namespace) -> None:
    """Train the teacher from a random start."""
    from tools.study.pretraining import pretrain

    # A run needs two steps to have a schedule of its learning rate.
    pretrain(options.folder, max(2, options.steps // options.shrink), options.device)


def search(options: argparse.Namespace) -> None:
    """Try every learning rate of every method."""
    from tools.study.description import Run

    runs = [
        Run("search", method, rope, rate)
        for method in options.methods
        for rope in options.ropes
        for rate in METHODS[method].rates
    ]
    _run_all(options, runs, options.workers)


def final(options: argparse.Namespace) -> None:
    """Run every method at its best rate, for every RoPE and seed, and measure the baselines."""
    from tools.study.description import Run
    from tools.study.results import best_rate, read_results

    results = read_results(options.folder)
    runs = [Run("baseline", "teacher", options.ropes[0])]
    runs += [Run("baseline", "scaled", rope) for rope in options.ropes]
    runs += [
        Run("final", method, rope, best_rate(results, method, rope), seed)
        for seed in range(1, options.seeds + 1)
        for rope in options.ropes
        for method in options.methods
    ]
    _run_all(options, runs, options.workers)


def timing(options: argparse.Namespace) -> None:
    """Time a few steps of each method, one run at a time per GPU."""
    import torch

    from tools.study.description import Run
    from tools.study.results import best_rate, read_results

    results, rope = read_results(options.folder), options.ropes[0]
    runs = [
        Run("timing", method, rope, best_rate(results, method, rope)) for method in options.methods
    ]
    _run_all(options, runs, max(1, torch.cuda.device_count()))


def report(options: argparse.Namespace) -> None:
    """Write tables and plots."""
    from tools.study.results import read_results, reported
    from tools.study.tables import write_report

    results = reported(read_results(options.folder))
    write_report(options.output or options.folder, results, options.domain)


def _run_all(options: argparse.Namespace, runs: list, workers: int) -> None:
    from functools import partial

    from tools.study.folder import Study
    from tools.study.pool import run_all
    from tools.study.run import execute

    check_folder(options.folder, options.domain)
    run_all(
        options.command,
        runs,
        options.folder,
        partial(Study, options.folder, options.domain, options.device, options.shrink),
        execute,
        workers,
        math.inf if options.seconds is None else options.seconds,
    )


def check_folder(folder: Path, domain: str) -> None:
    """Refuse a study that lacks its teacher or the text that restores.

    Raises:
        UserError: naming what is missing.
    """
    if not (folder / "teacher" / "config.json").exists():
        raise UserError(f"{folder} has no teacher: run the command pretrain first")
    if not (folder / "corpus" / domain / "train").is_dir():
        raise UserError(f"{folder / 'corpus'} has no text of --domain {domain}: check its spelling")


COMMANDS = {
    "pretrain": pretrain,
    "search": search,
    "final": final,
    "timing": timing,
    "report": report,
}

if __name__ == "__main__":
    sys.exit(main())
