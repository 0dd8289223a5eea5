"""Time one layer's exchanges over the context-parallel axis, on 1, 2, 4, ... ranks.

    torchrun --nproc-per-node 4 -m tools.bench.context --lengths 32768 65536 --json context.json
    torchrun --nproc-per-node 4 -m tools.bench.context --attention
    python -m tools.bench.context --traffic

Every power of two up to the number of ranks is measured, in one run. Times are medians of the
slowest rank.

Without a further flag the benchmark times one relation, forward and gradient, by the trainer's
difference-cover schedule. The reference gathers the rows of all ranks. "not hidden" is the share of
the schedule's time by which it exceeds the same work without the transfers.

With --attention it times the attention of one layer to one document, forward and backward. The
trainer either gathers K and V first, or attends to the local chunk first while K and V arrive (in
half precision, and on pieces that are long enough). The reference is a ring
(``tools.bench.ring_attention``). Memory is the peak beyond q, k and v.

Before the timing, the results of the different ways are compared with each other.

With --traffic it prints the bytes that one rank sends per layer of LLaMA2-7B on up to 64 ranks, by
formula. First it compares the formula of the relations with the counters of the trainer on 2 to 8
ranks, which are processes on the CPU that it starts by itself. The other formulas are the
references: gathering for the relations, and a ring for attention.
"""

from __future__ import annotations

import argparse
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from megalard import cli
from megalard.errors import UserError
from tools import command_line

if TYPE_CHECKING:
    from megalard.parallel.mesh import Mesh


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = parse(arguments)
    return cli.run(lambda: run(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_line.make_parser("tools.bench.context", __doc__)
    at_least = command_line.at_least
    parser.add_argument(
        "--lengths",
        type=at_least(2),
        nargs="+",
        default=[32768, 65536, 131072],
        metavar="N",
        help="block lengths, in tokens; --traffic takes the longest",
    )
    parser.add_argument("--heads", type=at_least(1), default=32, metavar="N", help="heads")
    parser.add_argument(
        "--head-dim", type=at_least(1), default=128, metavar="D", help="features per head"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--attention", action="store_true", help="time attention instead")
    kinds.add_argument(
        "--traffic", action="store_true", help="print the bytes that a rank sends instead"
    )
    command_line.add_device(parser)
    command_line.add_dtype(parser)
    command_line.add_repeats(parser, 5)
    command_line.add_json(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure and report; a collective call of all ranks."""
    from tools.bench import context_attention, context_relation, context_traffic
    from tools.bench.results import describe_environment, print_environment, write_json

    if options.traffic:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("--traffic starts eight processes by itself: run it without torchrun")
        environment, results = {"device": "cpu"}, context_traffic.report(max(options.lengths))
    else:
        from megalard.parallel.mesh import build_mesh

        mesh = build_mesh(options.device, 1)
        environment = describe_environment(mesh.device)
        if mesh.is_rank_0:
            print_environment(environment)
        kind = context_attention if options.attention else context_relation
        results = measure(options, mesh, kind)
        if not mesh.is_rank_0:
            return
    if options.json:
        write_json(options.json, environment, options, results)


def measure(options: argparse.Namespace, mesh: Mesh, kind: ModuleType) -> list[dict]:
    """Measure every length on every number of ranks.

    Args:
        kind: the module that measures one of them and prints the result.

    Returns:
        The results, on rank 0.

    Raises:
        UserError: on every rank, if a length does not divide into the pieces of the ranks, or the
            device has no kernel for the dtype.
    """
    import torch.distributed as dist

    from megalard.parallel.context.shard import SequenceShard
    from megalard.parallel.mesh import SINGLE, Axis
    from tools.bench.timing import synchronize

    if options.attention and options.dtype == "float32" and mesh.device.type == "cuda":
        raise UserError("--dtype is float32, which cuDNN's attention does not take: use bfloat16")
    rank, world = mesh.world.rank, mesh.world.size
    sizes = [2**power for power in range(world.bit_length()) if 2**power <= world]
    for length in options.lengths:
        SequenceShard(length, Axis(None, 0, sizes[-1]))
    groups = {size: dist.new_group(list(range(size))) if size > 1 else None for size in sizes}
    report, results = kind.Report(mesh.is_rank_0), []
    for length in options.lengths:
        for size in sizes:
            if rank < size:
                axis = SINGLE if size == 1 else Axis(groups[size], rank, size)
                results.append(kind.measure(options, length, axis, mesh.device))
                report.add(results[-1])
            synchronize(mesh.device, mesh.world)
    return results


if __name__ == "__main__":
    sys.exit(main())
