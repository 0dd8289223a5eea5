"""Accuracy and speed of the relation-KL kernels on this GPU, beside attention's.

    python tools/bench/relation.py [--lengths 4096 32768] [--shapes d128 packed] [--json FILE]

Accuracy: values and gradients at n = 1024 against dense float64, for every dtype and head_dim.
Speed: bf16, causal, GPU time (median, least and most of several runs), of the relation as this GPU
runs it, of the plain Triton kernels, and of cuDNN's attention on the same shapes; the share is the
relation's rate over cuDNN's. All rates of a run stand beside its 8192^3 bf16 matrix product.

Rates count half-products over the allowed pairs, each 2 d FLOP a pair and head. The relation's
forward has 2 of them (student and teacher scores) and its backward 4 (both again, D X and D^T X;
what the kernel recomputes is not counted); attention's forward has 2 (QK^T, PV), its backward 5.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalard.kernels.relation_kl import (
    causal_mask,
    relation_backward,
    relation_forward,
    segment_mask,
)
from megalard.kernels.relation_kl.operands import check_operands
from megalard.kernels.relation_kl.triton.backward import triton_backward
from megalard.kernels.relation_kl.triton.forward import triton_forward

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF_PRODUCTS = {"relation": (2, 4), "plain Triton": (2, 4), "cuDNN": (2, 5)}
# Lengths of packed documents, as shares of the sequence.
DOCUMENTS = (0.31, 0.02, 0.17, 0.05, 0.24, 0.01, 0.12, 0.08)


@dataclass(frozen=True)
class Shape:
    """What is timed; grouped heads are timed as the relation of queries to keys."""

    heads: int = 32
    kv_heads: int = 32
    d: int = 128
    packed: bool = False

    def documents(self, n: int) -> list[int]:
        if not self.packed:
            return [n]
        lengths = [int(share * n) for share in DOCUMENTS]
        return [*lengths[:-1], n - sum(lengths[:-1])]

    def pairs(self, n: int) -> int:
        return sum(length * length // 2 for length in self.documents(n))


SHAPES = {
    "d128": Shape(),
    "d64": Shape(d=64),
    "grouped": Shape(kv_heads=8),
    "packed": Shape(packed=True),
}


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("bench_relation needs a CUDA device")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}\n")
    result = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    if not args.skip_accuracy:
        result["accuracy"] = check_accuracy(args.head_dims)
    if args.lengths:
        result["matmul_tflops"] = matmul_rate(args.repeats)
        print(f"8192^3 bf16 matrix product: {result['matmul_tflops']:.0f} TFLOP/s\n")
        result["speed"] = [
            row
            for name in args.shapes
            for row in measure_speed(name, args.lengths, args.repeats, result["matmul_tflops"])
        ]
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="*",
        default=[4096, 8192, 16384, 32768, 65536, 131072],
        metavar="N",
        help="sequence lengths to time (default: %(default)s); none to skip timing",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=list(SHAPES),
        help="shapes to time (default: all)",
    )
    parser.add_argument(
        "--head-dims",
        type=int,
        nargs="+",
        default=[64, 80, 128, 256],
        metavar="D",
        help="head dimensions whose accuracy is checked (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed runs (default: 10)")
    parser.add_argument("--skip-accuracy", action="store_true", help="only time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser.parse_args()


def check_accuracy(head_dims: list[int]) -> list[dict]:
    """Largest error of KL (nats) and relative L2 error of the gradient, unit-normal vectors.

    The gradient is judged twice: accumulated (fp32 output) and as stored in the operands' dtype.
    """
    b, heads, n = 1, 4, 1024
    print(f"against dense float64, b={b} H={heads} n={n}, causal")
    print_row("dtype", "head_dim", "max |KL err|", "grad (fp32)", "grad (stored)")
    rows, mask = [], causal_mask(b, n, "cuda")
    for name, dtype in DTYPES.items():
        for d in head_dims:
            torch.manual_seed(0)
            x, y = (torch.randn(b, heads, n, d, device="cuda").to(dtype) for _ in range(2))
            kl, grad = dense_relation(x, y)
            lse_s, lse_t, fast_kl = relation_forward(x, y, mask=mask)
            errors = [(fast_kl - kl).abs().max().item()]
            for out_dtype in (torch.float32, dtype):
                fast = relation_backward(
                    x, y, None, None, lse_s, lse_t, mask=mask, out_dtype=out_dtype
                )
                errors.append(((fast - grad).norm() / grad.norm()).item())
            keys = ("kl_max_error", "grad_error_fp32", "grad_error_stored")
            rows.append({"dtype": name, "head_dim": d, **dict(zip(keys, errors, strict=True))})
            print_row(name, d, *(f"{error:.1e}" for error in errors))
    print()
    return rows


def dense_relation(x_bhnd: Tensor, y_bhnd: Tensor) -> tuple[Tensor, Tensor]:
    """Causal self-relation KL [b, H, n] and the gradient of its sum, dense in float64."""
    x, y = x_bhnd.double().requires_grad_(), y_bhnd.double()
    n, d = x.shape[2:]
    hidden = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
    logp_s, logp_t = (
        (z @ z.mT * d**-0.5).masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, 0)
        for z in (x, y)
    )
    kl = (logp_t.exp() * (logp_t - logp_s)).sum(-1)
    return kl.detach(), torch.autograd.grad(kl.sum(), x)[0]


def matmul_rate(repeats: int) -> float:
    """TFLOP/s of an 8192^3 product of random bf16 matrices."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / times_ms(lambda: x @ y, repeats)[0] / 1e9


def measure_speed(name: str, lengths: list[int], repeats: int, sky: float) -> list[dict]:
    """Forward and backward of each operation, n by n, at one shape."""
    shape = SHAPES[name]
    print(f"{name}: {shape}")
    print_row("n", "operation", "pass", "ms", "from", "to", "TFLOP/s", "of matmul", "of cuDNN")
    rows = []
    for n in lengths:
        rates: dict[tuple[str, str], float] = {}
        for operation in ("cuDNN", "plain Triton", "relation"):
            try:
                passes = OPERATIONS[operation](shape, n)
                timed = [times_ms(run, repeats) for run in passes]
            except (RuntimeError, torch.OutOfMemoryError) as error:
                print_row(n, operation, str(error).splitlines()[0][:60])
                continue
            halves = HALF_PRODUCTS[operation]
            for side, half, times in zip(("forward", "backward"), halves, timed, strict=True):
                rate = half * 2 * shape.heads * shape.pairs(n) * shape.d / times[0] / 1e9
                rates[operation, side] = rate
                share = rate / rates.get(("cuDNN", side), float("nan"))
                print_row(
                    n, operation, side, *(f"{x:.3f}" for x in times),
                    f"{rate:.0f}", f"{rate / sky:.2f}", f"{share:.2f}",
                )  # fmt: skip
                keys = ("ms", "least_ms", "most_ms")
                rows.append(
                    {"shape": name, "n": n, "operation": operation, "pass": side}
                    | dict(zip(keys, times, strict=True))
                    | {"tflops": rate, "of_matmul": rate / sky, "of_cudnn": share}
                )
            del passes
    print()
    return rows


def random(heads: int, n: int, d: int) -> Tensor:
    return torch.randn(1, heads, n, d, device="cuda", dtype=torch.bfloat16)


def relation_operands(shape: Shape, n: int) -> tuple[list[Tensor | None], object]:
    """Rows and columns of student and teacher, and the mask."""
    operands = [random(shape.heads, n, shape.d) for _ in range(2)]
    grouped = shape.kv_heads != shape.heads
    operands += [random(shape.kv_heads, n, shape.d) if grouped else None for _ in range(2)]
    if not shape.packed:
        return operands, causal_mask(1, n, "cuda")
    lengths = torch.tensor(shape.documents(n))
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return operands, segment_mask(ids[None].cuda())


def relation_passes(shape: Shape, n: int) -> tuple[Callable, Callable]:
    """As this GPU runs it."""
    operands, mask = relation_operands(shape, n)
    lse_s, lse_t, _ = relation_forward(*operands, mask=mask)
    return (
        lambda: relation_forward(*operands, mask=mask),
        lambda: relation_backward(*operands, lse_s, lse_t, mask=mask),
    )


def plain_passes(shape: Shape, n: int) -> tuple[Callable, Callable]:
    """The plain Triton kernels, which run on every GPU."""
    operands, mask = relation_operands(shape, n)
    op = check_operands(*operands, mask, None, None)
    lse_s, lse_t, _ = triton_forward(op, partial=False)
    return (
        lambda: triton_forward(op, partial=False),
        lambda: triton_backward(op, lse_s, lse_t, None, torch.bfloat16),
    )


def attention_passes(shape: Shape, n: int) -> tuple[Callable, Callable]:
    """cuDNN's causal attention; packed documents one after the other."""
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    inputs = [
        [random(h, length, shape.d).requires_grad_() for h in heads]
        for length in shape.documents(n)
    ]
    grouped = shape.kv_heads != shape.heads

    def forward() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return [
                torch.nn.functional.scaled_dot_product_attention(
                    *qkv, is_causal=True, enable_gqa=grouped
                )
                for qkv in inputs
            ]

    out, upstream = forward(), [torch.randn_like(qkv[0]) for qkv in inputs]
    return forward, lambda: [
        torch.autograd.grad(o, qkv, g, retain_graph=True)
        for o, qkv, g in zip(out, inputs, upstream, strict=True)
    ]


OPERATIONS = {
    "relation": relation_passes,
    "plain Triton": plain_passes,
    "cuDNN": attention_passes,
}


def times_ms(run: Callable, repeats: int) -> tuple[float, float, float]:
    """(median, least, most) GPU time of ``run`` after three runs to warm up.

    The GPU is kept busy while the host prepares a run, so that its launches leave no gaps.
    """
    times = []
    for step in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # clock cycles, about a millisecond
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if step >= 3:
            times.append(start.elapsed_time(stop))
    return statistics.median(times), min(times), max(times)


def print_row(*cells) -> None:
    print("".join(f"{cell!s:>13}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
