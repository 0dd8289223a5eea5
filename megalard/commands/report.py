"""Write the report of a run: one HTML file with its configuration, curves, tables and cost.

  megalard report RUN

The page has the configuration in short, the evaluation, the curves of training and validation,
the loss of each layer at the beginning and at the end, RoPE before and after scaling, and the cost.
What a run does not have is left out.

RUN is the output directory of a run that has ended, or that still goes on. The page is written to
RUN/report.html, over an older one. It needs no other file and no network. A run that ends writes it
by itself, unless run.report is false.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megalard.files.writing import cannot_write

NAME, HELP = "report", "write the report of a run as one HTML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("directory", type=Path, metavar="RUN", help="a run's output directory")


def run(options: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from megalard.report.page import write_report

    try:
        print(write_report(options.directory))
    except OSError as error:
        raise cannot_write(options.directory, error) from None
    return 0
