"""Time steps of the trainer on a model of a known shape with random weights.

    python -m tools.bench.step --shape llama2-7b --tokens 4096 --json step.json
    torchrun --nproc-per-node 4 -m tools.bench.step --tp 4 --activation-checkpointing no

A step is the forward and backward pass of one micro-batch per data-parallel rank, and the update:
the sums over ranks, clipping, and the optimizer. One row per block length, without and with
activation checkpointing, has the median and the range of both parts, tokens per second of the
complete step, and the peak memory. All numbers were measured on rank 0.

The reference is a product of two square matrices of the same dtype, measured in the same run: 8192
rows on a GPU, 512 on a CPU. The column "of product" is the rate of the forward and backward pass
relative to the rate of that product. It counts the operations that ``megalard.estimate.flops``
counts: the linear layers, causal attention, the relations and LoRA's products, each as often as the
loss and the trained weights need them. Weights that are not trained have no weight gradients.
Activation checkpointing computes some products twice, and they count once. Everything else, such as
norms, softmax and RoPE, does not count.

Under each row are the parts of one more step, which torch.profiler traces (--no-trace leaves it
out, for blocks so long that a step takes minutes). For the shape that the
paper trains, LLaMA2-7B, a row also has the time that the paper's 4.25M tokens would take at this
rate. The authors' implementation is not part of this repository, so there is no time of it here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import TYPE_CHECKING

from megalard import cli
from tools import command_line
from tools.bench.shapes import add_shape

# The settings of each choice of --optimizer.
OPTIMIZERS = {
    "whole": {"parallel.shard_optimizer": False},
    "divided": {},
    "offloaded": {"parallel.offload_optimizer": True},
    "divided-weights": {"parallel.shard_weights": True},
}

if TYPE_CHECKING:
    from megalard.parallel.mesh import Mesh
    from tools.bench.timing import MatrixProduct


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = parse(arguments)
    return cli.run(lambda: run(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_line.make_parser("tools.bench.step", __doc__)
    at_least = command_line.at_least
    add_shape(parser)
    parser.add_argument(
        "--tokens",
        type=at_least(2),
        nargs="+",
        default=[4096],
        metavar="N",
        help="block lengths to measure, in tokens; each is also the native window of the model",
    )
    parser.add_argument(
        "--micro-batch", type=at_least(1), default=1, metavar="N", help="blocks per micro-batch"
    )
    parser.add_argument(
        "--lora-rank",
        type=at_least(1),
        default=1024,
        metavar="N",
        help="rank of the LoRA pairs of q, k and v",
    )
    parser.add_argument(
        "--lora-dropout",
        type=command_line.share,
        default=0.0,
        metavar="SHARE",
        help="share of LoRA's inputs that is set to zero",
    )
    parser.add_argument(
        "--qk-weight",
        type=at_least(0, float),
        default=0.0,
        metavar="W",
        help="weight of the relation Q Kᵀ, next to the relations of q, k and v",
    )
    parser.add_argument(
        "--train",
        choices=("lora", "all"),
        default="lora",
        help="train LoRA pairs against the teacher, or all weights to predict the next token, "
        "without a teacher",
    )
    parser.add_argument(
        "--optimizer",
        choices=tuple(OPTIMIZERS),
        nargs="+",
        default=["divided"],
        help="where the optimizer's state is: whole on every GPU, divided over the GPUs that hold "
        "the same weights, or divided and in host memory; each is measured",
    )
    parser.add_argument(
        "--gradient-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype in which divided gradients are exchanged and summed",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep the tensors that the backward pass needs in host memory",
    )
    command_line.add_activation_checkpointing(parser)
    command_line.add_parallel(parser)
    command_line.add_device(parser)
    command_line.add_dtype(parser)
    command_line.add_repeats(parser, 7)
    parser.add_argument(
        "--warm-up",
        type=at_least(0),
        default=2,
        metavar="N",
        help="steps before the steps that are measured",
    )
    parser.add_argument(
        "--longest-kernels",
        type=at_least(0),
        default=0,
        metavar="N",
        help="also print the N kernels of the traced step that take most of the GPU's time",
    )
    parser.add_argument("--no-trace", action="store_true", help="leave out the traced step")
    command_line.add_json(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure every setting and report; a collective call of all ranks."""
    import torch

    from megalard.evaluation.measure import check_lengths
    from megalard.parallel.mesh import build_mesh
    from tools.bench.results import describe_environment, write_json
    from tools.bench.step_measurement import measure
    from tools.bench.timing import measure_matrix_product

    mesh = build_mesh(options.device, options.tp, options.cp)
    check_lengths(options.tokens, options.cp, "--tokens")
    environment = describe_environment(mesh.device)
    product = measure_matrix_product(mesh.device, getattr(torch, options.dtype))
    report, results = StepReport(options, mesh, product, environment), []
    settings = command_line.CHECKPOINTING[options.activation_checkpointing]
    for tokens, checkpointing, optimizer in itertools.product(
        options.tokens, settings, options.optimizer
    ):
        keys = {"parallel.activation_checkpointing": checkpointing, **OPTIMIZERS[optimizer]}
        result = measure(options, tokens, keys, mesh, product)
        result |= {"activation_checkpointing": checkpointing, "optimizer": optimizer}
        results.append(result)
        if mesh.is_rank_0:
            report.add(result)
            if options.json:
                # After every setting, in case that the next one does not fit into memory.
                facts = {
                    "product_flops": product.flops,
                    "product_size": product.size,
                    "ranks": mesh.world.size,
                }
                write_json(options.json, environment, options, results, **facts)


class StepReport:
    """The report of the benchmark, which rank 0 prints as results come."""

    def __init__(
        self,
        options: argparse.Namespace,
        mesh: Mesh,
        product: MatrixProduct,
        environment: dict[str, str],
    ):
        from tools.bench.results import Table, print_environment

        self._options = options
        if not mesh.is_rank_0:
            return
        print_environment(environment)
        print(f"reference: {product}")
        print(
            f"{options.shape}, blocks per micro-batch: {options.micro_batch}, trained: "
            f"{f'LoRA of rank {options.lora_rank}' if options.train == 'lora' else 'all weights'}, "
            f"{options.dtype}, dp {mesh.dp.size} x cp {mesh.cp.size} x tp {mesh.tp.size}"
            f"{', saved tensors in host memory' if options.offload else ''}\n"
        )
        self._table = Table(
            "tokens",
            "checkpointing",
            "optimizer",
            "fwd + bwd, s",
            ("range, s", 13),
            "update, s",
            "tokens/s",
            "of product",
            "peak GiB",
            "between steps",
        )

    def add(self, result: dict) -> None:
        """Print one result."""
        from tools.bench.step_trace import StepTrace, print_trace

        passes, memory = result["forward_backward_seconds"], result["peak_gib"]
        self._table.row(
            f"{result['tokens']:,}",
            "yes" if result["activation_checkpointing"] else "no",
            result["optimizer"],
            f"{passes['median']:.3f}",
            f"{passes['shortest']:.3f}-{passes['longest']:.3f}",
            f"{result['update_seconds']['median']:.3f}",
            f"{result['tokens_per_second']:,.0f}",
            f"{result['of_product']:.1%}",
            "" if memory is None else f"{memory:.1f}",
            "" if memory is None else f"{result['between_steps_gib']:.1f}",
        )
        if "trace" in result:
            print_trace(StepTrace(**result["trace"]))
        if "recipe_minutes" in result:
            print(
                f"    the paper's {result['recipe_tokens'] / 1e6:.2f}M tokens would take "
                f"{result['recipe_minutes']:.1f} minutes, with an update after every micro-batch"
            )


if __name__ == "__main__":
    sys.exit(main())
