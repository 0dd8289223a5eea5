"""Compare megalard with the authors' implementation of LinearARD, on one GPU and in one run.

    git clone https://github.com/gracefulning/LinearARD AUTHORS
    python -m tools.bench.authors --checkout AUTHORS --json authors.json

First the benchmark compares the losses of both implementations, and their gradients of the weights
of q, k and v, on a small model with grouped heads. Both compute in bf16 from the same weights and
tokens, and both are compared with megalard's results in fp32. The authors divide all three
relations by the number of query heads, so megalard's relations have the weights 1, Hkv/Hq and
Hkv/Hq.

Then it measures one micro-step (forward, backward and update) of --shape in both, with LoRA on q, k
and v and activation checkpointing, which tools.bench.authors_plot draws. It needs a GPU and the
package peft. At the default shape the authors' step takes some 25 s on an H200.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megalard import cli
from tools import command_line
from tools.bench.shapes import add_shape

if TYPE_CHECKING:
    import torch

    from megalard.parallel.mesh import Mesh


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = command_line.make_parser("tools.bench.authors", __doc__)
    at_least = command_line.at_least
    add_shape(parser)
    parser.add_argument(
        "--checkout", type=Path, required=True, metavar="DIR", help="the authors' repository"
    )
    parser.add_argument(
        "--parity-tokens",
        type=at_least(2),
        default=1024,
        metavar="N",
        help="length of the block whose loss and gradients are compared",
    )
    parser.add_argument(
        "--tokens", type=at_least(2), default=4096, metavar="N", help="length of the timed block"
    )
    parser.add_argument(
        "--lora-rank", type=at_least(1), default=1024, metavar="N", help="rank of the LoRA pairs"
    )
    parser.add_argument("--skip-time", action="store_true", help="compare the loss alone")
    command_line.add_device(parser)
    command_line.add_repeats(parser, 3)
    command_line.add_json(parser)
    options = parser.parse_args(arguments)
    return cli.run(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    from megalard.parallel.mesh import build_mesh
    from tools.bench.authors_model import load_kernel
    from tools.bench.results import describe_environment, print_environment, write_json

    mesh = build_mesh(options.device, 1)
    environment = describe_environment(mesh.device)
    print_environment(environment)
    kernel = load_kernel(options.checkout)
    results = {"parity": compare(kernel, options.parity_tokens, mesh)}
    print_parity(results["parity"])
    if options.json:
        write_json(options.json, environment, options, [results])
    if options.skip_time:
        return
    print(f"\nmeasuring {options.repeats + 1} steps of both", flush=True)
    results["time"] = times = measure(kernel, options, mesh)
    print_times(times, options)
    if options.json:
        write_json(options.json, environment, options, [results])


def compare(kernel, tokens: int, mesh: Mesh) -> dict:
    """Return losses, and relative distances of gradients in norm, on a model of grouped heads."""
    import torch

    from tools.bench.authors_model import AuthorsModels
    from tools.bench.authors_parity import GROUPED, our_loss_and_gradients

    models = AuthorsModels(kernel, GROUPED, tokens, mesh.device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = models.teacher.config.vocab_size
    tokens_bs = torch.randint(vocabulary, (1, tokens), generator=generator).to(mesh.device)
    loss = models.loss(tokens_bs)
    loss.backward()
    authors_gradients = {name: p.grad.float() for name, p in models.parameters.items()}
    state = models.teacher.state_dict()
    losses = {"authors": loss.item()}
    gradients = {"authors": authors_gradients}
    for dtype in ("bfloat16", "float32"):
        losses[dtype], gradients[dtype] = our_loss_and_gradients(state, tokens_bs, dtype, mesh)
    exact = gradients["float32"]

    def distance(actual: dict[str, torch.Tensor]) -> dict[str, float]:
        return {
            projection: _relative_distance(actual, exact, f"{projection}_proj")
            for projection in "qkv"
        }

    return {
        "shape": GROUPED,
        "tokens": tokens,
        "loss": losses,
        "gradient_distance": {key: distance(gradients[key]) for key in ("authors", "bfloat16")},
    }


def _relative_distance(actual: dict, exact: dict, part: str) -> float:
    names = [name for name in exact if part in name]
    square = sum(float((actual[name] - exact[name]).norm() ** 2) for name in names)
    return (square / sum(float(exact[name].norm() ** 2) for name in names)) ** 0.5


def print_parity(parity: dict) -> None:
    """Print losses and distances as a table."""
    from tools.bench.results import Table

    print(f"\n{parity['shape']}, {parity['tokens']} tokens; distances to ours in fp32")
    table = Table(("", 16), ("loss", 12), ("of loss", 10), "grad q", "grad k", "grad v")
    exact = parity["loss"]["float32"]
    labels = {"authors": "authors, bf16", "bfloat16": "megalard, bf16"}
    for key, label in labels.items():
        loss, distances = parity["loss"][key], parity["gradient_distance"][key]
        cells = (f"{distances[projection]:.2e}" for projection in "qkv")
        table.row(label, f"{loss:.8f}", f"{abs(loss - exact) / exact:.1e}", *cells)
    table.row("megalard, fp32", f"{exact:.8f}")


def measure(kernel, options: argparse.Namespace, mesh: Mesh) -> dict:
    """Return time and memory of a micro-step of both implementations."""
    from tools.bench.authors_parity import our_micro_step, step_times

    # The modules of transformers and PEFT leave memory behind, so that they come last.
    ours = step_times(
        our_micro_step(options.shape, options.tokens, options.lora_rank, options.device, mesh),
        mesh.device,
        options.repeats,
    )
    gc.collect()
    results = {"authors": _time_authors(kernel, options, mesh), "megalard": ours}
    return {key: asdict(value) for key, value in results.items()}


def _time_authors(kernel, options: argparse.Namespace, mesh: Mesh):
    import torch

    from tools.bench.authors_model import AuthorsModels
    from tools.bench.authors_parity import step_times

    models = AuthorsModels(kernel, options.shape, options.tokens, mesh.device, options.lora_rank)
    tokens_bs = torch.randint(
        models.teacher.config.vocab_size, (1, options.tokens), device=mesh.device
    )
    optimizer = torch.optim.AdamW(models.parameters.values(), lr=2e-5)

    def step() -> None:
        models.loss(tokens_bs).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step_times(step, mesh.device, options.repeats)


def print_times(times: dict, options: argparse.Namespace) -> None:
    """Print time, memory and the ratio."""
    from tools.bench.results import Table

    print(
        f"\n{options.shape}, a micro-step of {options.tokens} tokens, LoRA rank {options.lora_rank}"
    )
    table = Table(("", 10), "s", "tokens/s", "peak GiB", "speed-up")
    slow = times["authors"]["seconds"]
    for key, value in times.items():
        seconds, memory = value["seconds"], value["peak_gib"]
        table.row(
            key,
            f"{seconds:.3f}",
            f"{options.tokens / seconds:,.0f}",
            "" if memory is None else f"{memory:.1f}",
            f"{slow / seconds:.1f}",
        )


if __name__ == "__main__":
    sys.exit(main())
