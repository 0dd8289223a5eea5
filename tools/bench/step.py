"""Time whole training steps of a model shape with random weights.

    python tools/bench/step.py [--shape llama2-7b] [--tokens 4096] [--json FILE]
    torchrun --nproc-per-node 4 tools/bench/step.py --tp 4

Prints, for each setting asked for, the median and spread of a micro-step (forward and backward) and
of the update (sums over ranks, clipping, optimizer), the peak memory, the model FLOP utilisation
against an 8192^3 matrix product (512^3 on a CPU) measured in the same run, and of one further,
traced step the time of each part and how busy the GPU is. Tokens per second are those of micro-step
and update together.

For the shape the paper trains, also how long its recipe would take at this rate.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from megalard.checkpoint.build import empty_decoder, set_parameter
from megalard.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RelationWeights,
    RopeConfig,
    RunConfig,
    TrainableConfig,
)
from megalard.data.batch import Batch, collate
from megalard.distill.student import build_student
from megalard.model.decoder import Decoder
from megalard.model.rope import rope_table, scaled_config
from megalard.model.spec import ModelSpec, spec_from_config
from megalard.parallel.mesh import Mesh, build_mesh
from megalard.training.step import Distiller
from tools.bench.step_trace import StepTrace, trace_step

SHAPES = {
    "tiny": (256, 4, 4, 4, 688, 1000),
    "llama2-7b": (4096, 32, 32, 32, 11008, 32000),
    "llama3-8b": (4096, 32, 32, 8, 14336, 128256),
    "llama2-70b": (8192, 80, 64, 8, 28672, 32000),
}

# What the paper restores LLaMA2-7B with (LinearARD, arXiv 2604.00004).
RECIPE_TOKENS, RECIPE_SHAPE = 4_250_000, "llama2-7b"
# One micro-step of transformers + PEFT + the authors' kernels on one H200, with activation
# checkpointing and two copies of the weights, in these settings; measured once and quoted.
QUOTED = {"seconds": 24.6, "peak_gib": 57.9}
QUOTED_SETTINGS = {
    "shape": "llama2-7b",
    "tokens": 4096,
    "batch": 1,
    "rank": 1024,
    "qk": 0.0,
    "dropout": 0.0,
    "dtype": "bfloat16",
    "offload": False,
}


def make_spec(shape: str, context: int) -> ModelSpec:
    """A Llama of one of the known shapes."""
    hidden, layers, heads, kv_heads, inner, vocab = SHAPES[shape]
    return spec_from_config(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": inner,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": context,
            "rope_theta": 10000.0,
        },
        shape,
    )


def random_decoder(spec: ModelSpec, mesh: Mesh, dtype: torch.dtype) -> Decoder:
    """A frozen decoder with random weights of the size trained ones have."""
    decoder = empty_decoder(spec, rope_table(spec), mesh.tp)
    torch.manual_seed(0)
    for name, layout in decoder.layouts.items():
        value = torch.empty(layout.local_shape, dtype=dtype, device=mesh.device)
        value.fill_(1.0) if "norm" in name else value.normal_(0, 0.02)
        set_parameter(decoder, name, nn.Parameter(value, requires_grad=False))
    return decoder


def make_config(options: argparse.Namespace, recompute: bool) -> Config:
    return Config(
        model=ModelConfig(teacher="random", compute_dtype=options.dtype),
        rope=RopeConfig("linear", 8.0),
        trainable=TrainableConfig(
            "lora", LoraConfig(["q", "k", "v"], options.rank, 2.0 * options.rank, options.dropout)
        ),
        objective=ObjectiveConfig(RelationWeights(qk=options.qk)),
        data=DataConfig(["random"], context_length=options.tokens),
        optimizer=OptimizerConfig(global_batch=options.batch, micro_batch=options.batch),
        parallel=ParallelConfig(options.tp, options.cp, recompute, options.offload),
        run=RunConfig(output="none", device=options.device),
    )


def random_batch(options: argparse.Namespace, spec: ModelSpec, mesh: Mesh) -> Batch:
    generator = torch.Generator().manual_seed(mesh.dp.rank)
    shape = (options.batch, options.tokens)
    tokens = torch.randint(0, spec.vocab_size, shape, generator=generator)
    batch = collate([(row.numpy(), [(0, options.tokens)]) for row in tokens])
    return batch.cut(mesh.cp).to(mesh.device)


class Clock:
    """Seconds of a region, by CUDA events where there is a GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self):
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def seconds(self, start, end) -> float:
        if self.device.type == "cuda":
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        return end - start


def product_size(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 512


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on random data."""
    clock, size = Clock(device), product_size(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(13):
        start = clock.now()
        a @ b
        times.append(clock.seconds(start, clock.now()))
    return 2 * size**3 / statistics.median(times[3:])


def needed_flops(spec: ModelSpec, options: argparse.Namespace) -> float:
    """Products this objective needs for one micro-step of one data-parallel rank.

    Teacher forward; student forward and backward through frozen weights (no weight gradients) and
    LoRA (with them); causal attention; relations (2 half-products forward, 4 backward). Of the last
    layer only q, k and v are needed.
    """
    tokens, layers = options.tokens * options.batch, spec.num_layers
    inner, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = spec.hidden_size * (inner + 2 * kv)
    rest = inner * spec.hidden_size + 3 * spec.hidden_size * spec.intermediate_size
    lora = options.rank * (3 * spec.hidden_size + inner + 2 * kv)
    square = options.batch * options.tokens**2 / 2
    attention = 4 * square * inner
    # the first layer's q/k/v input needs no gradient
    frozen = 2 * tokens * (qkv * (3 * layers - 1) + rest * 3 * (layers - 1))
    adapters = 2 * tokens * lora * 3 * layers
    attentions = attention * (1 + 1 + 2.5) * (layers - 1)
    half_product = 2 * square * spec.head_dim
    relations = 6 * half_product * (spec.num_heads + 2 * spec.num_kv_heads) * layers
    return frozen + adapters + attentions + relations


def measure(options: argparse.Namespace, mesh: Mesh, recompute: bool, rate: float) -> dict:
    """One setting: times over ``options.repeats`` steps after the warm-up steps."""
    spec, dtype = make_spec(options.shape, options.tokens), getattr(torch, options.dtype)
    config = make_config(options, recompute)
    gc.collect()
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    teacher = random_decoder(spec, mesh, dtype)
    student_spec = spec_from_config(scaled_config(spec, config.rope, options.tokens), "student")
    student = build_student(teacher, student_spec, rope_table(student_spec), config, mesh.tp)
    distiller = Distiller(teacher, student, config, mesh)
    batch, clock = random_batch(options, spec, mesh), Clock(mesh.device)
    micro, update = [], []
    for number in range(options.warm_up + options.repeats):
        start = clock.now()
        done = distiller.accumulate({"main": [batch]}, number)
        middle = clock.now()
        distiller.update(*done, number)
        end = clock.now()
        micro.append(clock.seconds(start, middle))
        update.append(clock.seconds(middle, end))
    micro, update = micro[options.warm_up :], update[options.warm_up :]
    memory = held = None
    if mesh.device.type == "cuda":
        memory, held = (
            amount() / 2**30
            for amount in (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated)
        )
    median, update_median = statistics.median(micro), statistics.median(update)
    tokens = options.tokens * options.batch * mesh.dp.size
    result = {
        "tokens": options.tokens,
        "recompute": recompute,
        "micro_step_seconds": median,
        "micro_step_spread": [min(micro), max(micro)],
        "update_seconds": update_median,
        "peak_gib": memory,
        "held_gib": held,
        "utilisation": needed_flops(spec, options) / (mesh.tp.size * mesh.cp.size) / median / rate,
        "tokens_per_second": tokens / (median + update_median),
    }
    if options.shape == RECIPE_SHAPE:
        result["recipe_minutes"] = RECIPE_TOKENS / result["tokens_per_second"] / 60
    alone = mesh.world.size == 1 and mesh.device.type == "cuda"
    if alone and QUOTED_SETTINGS.items() <= vars(options).items():
        result["quoted"] = QUOTED
    trace = trace_step(lambda: distiller.step({"main": [batch]}, 0), mesh.device)
    result["trace"] = asdict(replace(trace, kernels=trace.kernels[: 30 if options.trace else 0]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="tokens a block")
    parser.add_argument("--batch", type=int, default=1, help="blocks a micro-step")
    parser.add_argument("--rank", type=int, default=1024, help="LoRA rank")
    parser.add_argument("--dropout", type=float, default=0.0, help="LoRA dropout")
    parser.add_argument("--qk", type=float, default=0.0, help="weight of the Q/K relation")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--offload", action="store_true", help="saved tensors in host memory")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those that count")
    parser.add_argument("--recompute", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--trace", action="store_true", help="add the longest kernels")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    mesh = build_mesh(options.device, options.tp, options.cp)
    rate = product_rate(mesh.device, getattr(torch, options.dtype))
    results = []
    settings = {"no": [False], "yes": [True], "both": [False, True]}[options.recompute]
    for tokens, recompute in itertools.product(options.tokens, settings):
        one = argparse.Namespace(**{**vars(options), "tokens": tokens})
        results.append(measure(one, mesh, recompute, rate))
    if mesh.world.rank == 0:
        report(options, mesh, rate, results)
    if mesh.world.size > 1:
        torch.distributed.destroy_process_group()


def report(options: argparse.Namespace, mesh: Mesh, rate: float, results: list[dict]) -> None:
    print(
        f"{options.shape}, blocks a micro-step {options.batch}, LoRA rank {options.rank}, "
        f"dp {mesh.dp.size} x cp {mesh.cp.size} x tp {mesh.tp.size}; "
        f"{product_size(mesh.device)}^3 {options.dtype} product {rate / 1e12:.3g} TFLOP/s"
    )
    for result in results:
        low, high = result["micro_step_spread"]
        print(
            f"{result['tokens']:7,d} tokens  recompute {'yes' if result['recompute'] else 'no '}  "
            f"micro-step {result['micro_step_seconds']:.3f} s ({low:.3f}-{high:.3f})  "
            f"update {result['update_seconds']:.3f} s  {result['tokens_per_second']:,.0f} tokens/s"
        )
        memory = ""
        if result["peak_gib"] is not None:
            memory = f"; peak {result['peak_gib']:.1f} GiB, {result['held_gib']:.1f} between steps"
        print(f"    utilisation {result['utilisation']:.1%} of the product's rate{memory}")
        report_trace(StepTrace(**result["trace"]))
        if "recipe_minutes" in result:
            print(
                f"    the paper's {RECIPE_TOKENS / 1e6:.2f}M tokens, an update a micro-step: "
                f"{result['recipe_minutes']:.1f} minutes on {mesh.world.size} of these"
            )
        if "quoted" in result:
            seconds, peak = QUOTED["seconds"], QUOTED["peak_gib"]
            print(
                "    transformers + PEFT + the authors' kernels, with recomputation, on one H200 "
                f"(quoted): {seconds} s, {peak} GiB\n"
                f"    this is {seconds / result['micro_step_seconds']:.1f} times as fast, in "
                f"{result['peak_gib'] / peak:.2f} of the memory"
            )
    if options.json:
        content = {
            "options": {k: str(v) for k, v in vars(options).items() if k != "json"},
            "product_rate": rate,
        }
        options.json.write_text(json.dumps({**content, "results": results}, indent=2) + "\n")


def report_trace(trace: StepTrace) -> None:
    parts = "  ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in trace.parts.items())
    print(f"    traced, ms: {parts}")
    if trace.busy is not None:
        print(
            f"    the GPU is busy {trace.busy:.1%} of {trace.span * 1e3:.1f} ms; "
            f"longest gap {trace.gap * 1e6:.0f} us"
        )
    for name, seconds, calls in trace.kernels:
        print(f"    {seconds * 1e3:9.3f} ms {calls:6d} x {name[:90]}")


if __name__ == "__main__":
    sys.exit(main())
