"""Check a run before it is paid for: the same as ``megalard train --preflight``.

  megalard preflight --config FILE [--section.key value ...]

The command loads everything, takes two real steps, checks losses and gradients, reports memory and
time, and writes nothing.
"""

from __future__ import annotations

import argparse

from megalard.commands import train

NAME, HELP = "preflight", "check a run and measure two steps, without writing"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with the sections below, or the name of a recipe",
    )
    parser.set_defaults(preflight=True)


run = train.run
