"""Measure the accuracy and the speed of the kernels of the relation, next to attention's.

    python -m tools.bench.relation --json relation.json
    python -m tools.bench.relation --skip-accuracy --lengths 4096 32768 --shapes d128 packed

The accuracy is that of values and gradients on unit-normal vectors against dense float64, for every
dtype and head dimension.

The speed is measured in bf16 on one causal sequence. Three operations are timed on the same shapes:

  relation          with the kernels that the trainer chooses on this device
  Triton relation   with the Triton kernels, which run on every GPU
  attention         the reference, with cuDNN on a GPU and with torch's kernels on a CPU

Packed documents take one call of the relation, and one call of attention per document. Times are
medians and ranges of several runs.

Rates count half-products over the allowed pairs, each of 2 d FLOP per pair and head. The relation
has 2 of them forward (the scores of student and teacher) and 4 backward (both scores again, D X and
Dᵀ X; repeated products inside a kernel do not count). Attention has 2 forward (Q Kᵀ and P V) and 5
backward. The column "of product" is the rate relative to a square matrix product of the same run,
and "of attention" is the rate relative to the rate of attention.
"""

from __future__ import annotations

import argparse
import sys

from megalard import cli
from tools import command_line

SHAPES = ("d128", "d64", "grouped", "packed")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = parse(arguments)
    return cli.run(lambda: run(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_line.make_parser("tools.bench.relation", __doc__)
    at_least = command_line.at_least
    parser.add_argument(
        "--lengths",
        type=at_least(16),
        nargs="*",
        default=[4096, 8192, 16384, 32768, 65536, 131072],
        metavar="N",
        help="sequence lengths to time, in tokens; none to measure accuracy alone",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=SHAPES,
        help="shapes to time: 32 heads of 128 or 64 features; 32 query and 8 key heads; packed "
        "documents",
    )
    parser.add_argument(
        "--head-dims",
        type=at_least(1),
        nargs="+",
        default=[64, 80, 128, 256],
        metavar="D",
        help="head dimensions whose accuracy is measured",
    )
    parser.add_argument(
        "--accuracy-tokens",
        type=at_least(2),
        default=1024,
        metavar="N",
        help="length of the sequence whose accuracy is measured",
    )
    parser.add_argument("--skip-accuracy", action="store_true", help="measure speed alone")
    command_line.add_device(parser)
    command_line.add_repeats(parser, 10)
    command_line.add_json(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure and report."""
    import torch

    from megalard.kernels.relation_kl import describe_kernels
    from megalard.parallel.mesh import pick_device
    from tools.bench.relation_accuracy import measure_accuracy
    from tools.bench.relation_speed import measure_speed
    from tools.bench.results import describe_environment, print_environment, write_json
    from tools.bench.timing import measure_matrix_product

    device = pick_device(options.device, 0)
    environment = describe_environment(device) | {"kernels": describe_kernels(device)}
    print_environment(environment)
    facts: dict = {"accuracy": []}
    if not options.skip_accuracy:
        facts["accuracy"] = measure_accuracy(options.head_dims, options.accuracy_tokens, device)
    results = []
    if options.lengths:
        product = measure_matrix_product(device, torch.bfloat16)
        facts |= {"product_flops": product.flops, "product_size": product.size}
        print(f"\nreference: {product}")
        for shape in options.shapes:
            results += measure_speed(shape, options.lengths, options.repeats, product, device)
    if options.json:
        write_json(options.json, environment, options, results, **facts)


if __name__ == "__main__":
    sys.exit(main())
