"""Restore a model: distill the frozen teacher with native RoPE into the student with scaled RoPE.

  megalard train --config FILE [--section.key value ...]
  torchrun --nproc-per-node 8 -m megalard train --config FILE --parallel.tp 4

model.teacher, data.paths and run.output are required. The same command resumes the run that is in
run.output.
"""

from __future__ import annotations

import argparse
import signal

from megalard.config.file import load_config

NAME, HELP = "train", "restore a model, or resume the run in the output directory"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with the sections below, or the name of a recipe",
    )
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="load everything, take two real steps, check losses and gradients, report memory and "
        "time, and exit without writing",
    )


def run(options: argparse.Namespace) -> int:
    """Train, or check everything without writing."""
    config = load_config(options.config, options.rest)
    from megalard.train import preflight, train
    from megalard.training.stop_signals import StopSignals

    # A preflight that was stopped has not passed.
    with StopSignals(status=128 + signal.SIGTERM if options.preflight else 0) as stop:
        if options.preflight:
            preflight(config)
        else:
            train(config, stop)
    return 0
