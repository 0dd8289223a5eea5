"""Measure checkpoints against cp on a disk, or the cost of a save to the steps of a run.

    python -m tools.bench.checkpoint --scratch /a/disk --json checkpoint.json
    torchrun --nproc-per-node 4 -m tools.bench.checkpoint --stall --scratch /a/disk

Without --stall the benchmark measures ``megalard convert import`` and ``export`` of a model with
random weights, and save and load of its sharded state, each once and in a separate process. The
reference is a recursive ``cp`` of the same model. Caches are dropped before each measurement where
the system allows it (root on Linux). megalard ends every write with fsync. cp does not, so cp is
listed with and without a sync. The peak memory is the largest resident size of the process. For
save and load the size of the state is subtracted. At the end the exported model is compared with
the original bit for bit.

With --stall the benchmark trains LoRA on random tokens, and compares a save during the run, in the
foreground and in the background, with the same steps without a save. The cost of a save is the time
for which it blocks the run, plus the time by which the steps after it are slower.

The disk needs four times the size of the model, and save and load need its size in memory.
Everything is written to a new directory inside the scratch directory, which is removed at the end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalard import cli
from tools import command_line
from tools.bench.shapes import add_shape


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = parse(arguments)
    return cli.run(lambda: run(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_line.make_parser("tools.bench.checkpoint", __doc__)
    at_least = command_line.at_least
    parser.add_argument(
        "--scratch",
        type=Path,
        required=True,
        metavar="DIR",
        help="a directory on the disk to measure, which is made if it does not exist",
    )
    add_shape(parser)
    command_line.add_json(parser)
    stall = parser.add_argument_group("the cost of a save during a run")
    stall.add_argument("--stall", action="store_true", help="measure this instead")
    stall.add_argument(
        "--tokens", type=at_least(2), default=4096, metavar="N", help="tokens per step"
    )
    stall.add_argument(
        "--steps",
        type=at_least(1),
        default=30,
        metavar="N",
        help="the smallest number of steps without a save, and of steps after each save",
    )
    stall.add_argument(
        "--tp",
        type=at_least(1),
        metavar="N",
        help="tensor-parallel size (default: the number of ranks)",
    )
    command_line.add_device(stall)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure and report; with --stall a collective call of all ranks."""
    from tools.bench.results import write_json

    if options.stall:
        from tools.bench.checkpoint_stall import measure
    else:
        from tools.bench.checkpoint_files import measure
    report = measure(options)
    if report is not None and options.json:
        environment, results, facts = report
        write_json(options.json, environment, options, results, **facts)


if __name__ == "__main__":
    sys.exit(main())
