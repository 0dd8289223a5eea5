"""The measurement of ``tools.bench.step``: one block length, with one setting of checkpointing."""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict, replace

import torch

from megalard.data.batch import Batch
from megalard.estimate.flops import step_flops
from megalard.parallel.mesh import Mesh
from megalard.training.step import Distiller
from tools.bench.random_model import random_spec
from tools.bench.random_run import make_config, make_distiller, random_batches
from tools.bench.step_trace import trace_step
from tools.bench.timing import MatrixProduct, Seconds, Stopwatch

# The number of tokens with which the paper restores LLaMA2-7B (LinearARD, arXiv 2604.00004).
_RECIPE_TOKENS, _RECIPE_SHAPE = 4_250_000, "llama2-7b"

# The settings of --train all.
ALL_WEIGHTS = {
    "trainable.mode": "all",
    "objective.relations": "{q: 0, k: 0, v: 0, qk: 0}",
    "objective.language_modelling": 1,
}


def measure(
    options: argparse.Namespace,
    tokens: int,
    settings: dict[str, object],
    mesh: Mesh,
    product: MatrixProduct,
) -> dict:
    """Time steps on one random batch; a collective call of all ranks.

    Args:
        options: the options of ``tools.bench.step``.
        tokens: the length of a block.
        settings: further keys of the configuration.
        product: the reference.

    Returns:
        The result as JSON takes it.
    """
    config = make_config(
        {
            "model.compute_dtype": options.dtype,
            "trainable.lora.rank": options.lora_rank,
            "trainable.lora.alpha": 2 * options.lora_rank,
            "trainable.lora.dropout": options.lora_dropout,
            "objective.relations.qk": options.qk_weight,
            "data.context_length": tokens,
            "optimizer.global_batch": options.micro_batch * mesh.dp.size,
            "optimizer.micro_batch": options.micro_batch,
            "parallel.tp": options.tp,
            "parallel.cp": options.cp,
            "parallel.offload": options.offload,
            "parallel.gradient_dtype": options.gradient_dtype,
            "run.device": options.device,
            **(ALL_WEIGHTS if options.train == "all" else {}),
            **settings,
        }
    )
    gc.collect()
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    distiller = make_distiller(config, random_spec(options.shape, tokens), mesh)
    spec = distiller.student.decoder.spec
    batches = random_batches(config, spec, mesh)
    passes, updates = time_steps(distiller, batches, options.warm_up, options.repeats)
    flops_per_rank = step_flops(config, spec) / mesh.world.size
    rate = config.tokens_per_step / (passes.median + updates.median)
    result = {
        "tokens": tokens,
        "forward_backward_seconds": asdict(passes),
        "update_seconds": asdict(updates),
        "tokens_per_second": rate,
        "of_product": flops_per_rank / passes.median / product.flops,
        **memory_gib(mesh.device),
    }
    if options.shape == _RECIPE_SHAPE and options.train == "lora":
        result |= {"recipe_tokens": _RECIPE_TOKENS, "recipe_minutes": _RECIPE_TOKENS / rate / 60}
    if not options.no_trace:
        trace = trace_step(lambda: distiller.step(batches, 0), mesh.device)
        result["trace"] = asdict(replace(trace, kernels=trace.kernels[: options.longest_kernels]))
    return result


def time_steps(
    distiller: Distiller, batches: dict[str, list[Batch]], warm_up: int, repeats: int
) -> tuple[Seconds, Seconds]:
    """Return the times of the forward and backward passes, and the times of the updates."""
    stopwatch = Stopwatch(distiller.mesh.device)
    passes, updates = [], []
    for number in range(warm_up + repeats):
        start = stopwatch.mark()
        sums, counts = distiller.accumulate(batches, number)
        middle = stopwatch.mark()
        distiller.update(sums, counts, number)
        end = stopwatch.mark()
        passes.append(stopwatch.seconds(start, middle))
        updates.append(stopwatch.seconds(middle, end))
    return Seconds.of(passes[warm_up:]), Seconds.of(updates[warm_up:])


def memory_gib(device: torch.device) -> dict[str, float | None]:
    """Return the peak of the GPU's memory and its present use; None on a CPU."""
    if device.type != "cuda":
        return {"peak_gib": None, "between_steps_gib": None}
    return {
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "between_steps_gib": torch.cuda.memory_allocated(device) / 2**30,
    }
