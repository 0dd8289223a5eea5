"""Accuracy and speed of the relation-KL kernels on this GPU.

    python tools/check_relation_kl.py [--json FILE]

Accuracy: values and gradients at n = 1024 against dense float64, for every dtype and head_dim.
Speed: bf16, causal, median of CUDA-event times, beside torch's attention on the same shapes.

Rates count causal half-products, each 2 n^2 d / 2 FLOP a head, n^2 d b H in all. The relation's
forward has 2 of them (student and teacher scores) and its backward 4 (both again, D X and D^T X;
what the kernel recomputes is not counted); attention's forward has 2 (QK^T, PV), its backward 5.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalard.kernels.relation_kl import causal_mask, relation_backward, relation_forward, tiling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
HALF_PRODUCTS = {"relation": (2, 4), "cudnn": (2, 5), "flash": (2, 5)}


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("check_relation_kl needs a CUDA device")
    for table, tiles in (
        (tiling.FORWARD_TILES, args.forward_tiles),
        (tiling.BACKWARD_TILES, args.backward_tiles),
    ):
        if tiles:
            table[2, 128] = tiles
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}\n")
    accuracy = [] if args.skip_accuracy else check_accuracy(args.head_dims)
    speed = measure_speed(args.lengths, args.heads, args.head_dim, args.repeats)
    if args.json:
        result = {"device": device, "torch": torch.__version__}
        args.json.write_text(json.dumps({**result, "accuracy": accuracy, "speed": speed}, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="*",
        default=[4096, 8192, 16384, 32768, 65536],
        metavar="N",
        help="sequence lengths to time (default: %(default)s); none to skip timing",
    )
    parser.add_argument("--heads", type=int, default=32, help="heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="for timing (default: 128)")
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
    for side in ("forward", "backward"):
        parser.add_argument(
            f"--{side}-tiles",
            type=_tiles,
            metavar="OWN,OTHER,WARPS,STAGES",
            help=f"try these {side} tiles for 16-bit operands of head_dim 65 to 128",
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser.parse_args()


def _tiles(text: str) -> tuple[int, ...]:
    tiles = tuple(int(x) for x in text.split(","))
    if len(tiles) != 4:
        raise argparse.ArgumentTypeError("four numbers: own block, other block, warps, stages")
    return tiles


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


def measure_speed(lengths: list[int], heads: int, d: int, repeats: int) -> list[dict]:
    """Forward and backward of the relation and of each attention back end, n by n."""
    if not lengths:
        return []
    print(f"bf16, causal, b=1 H={heads} d={d}")
    print_row("n", "operation", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s")
    rows = []
    for n in lengths:
        for name in HALF_PRODUCTS:
            try:
                forward, backward = operation(name, heads, n, d)
                times_ms = [median_ms(run, repeats) for run in (forward, backward)]
            except RuntimeError as error:  # a back end this build lacks, or out of memory
                print_row(n, name, str(error).splitlines()[0][:60])
                continue
            rates = [
                halves * heads * n * n * d / time_ms / 1e9
                for halves, time_ms in zip(HALF_PRODUCTS[name], times_ms, strict=True)
            ]
            keys = ("forward_ms", "backward_ms", "forward_tflops", "backward_tflops")
            values = dict(zip(keys, times_ms + rates, strict=True))
            rows.append({"n": n, "operation": name, **values})
            pairs = zip(times_ms, rates, strict=True)
            print_row(n, name, *(text for ms, r in pairs for text in (f"{ms:.3f}", f"{r:.0f}")))
    return rows


def operation(name: str, heads: int, n: int, d: int) -> tuple[Callable, Callable]:
    """(forward, backward) of one operation, on fresh random operands."""

    def random() -> Tensor:
        return torch.randn(1, heads, n, d, device="cuda", dtype=torch.bfloat16)

    if name == "relation":
        x, y, mask = random(), random(), causal_mask(1, n, "cuda")
        lse_s, lse_t, _ = relation_forward(x, y, mask=mask)
        return (
            lambda: relation_forward(x, y, mask=mask),
            lambda: relation_backward(x, y, None, None, lse_s, lse_t, mask=mask),
        )
    inputs, upstream = [random().requires_grad_() for _ in range(3)], random()

    def attention() -> Tensor:
        with sdpa_kernel(ATTENTION[name]):
            return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)

    out = attention()
    return attention, lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True)


def median_ms(run: Callable, repeats: int) -> float:
    """Median time of ``run`` on the GPU, after three runs to warm up."""
    times = []
    for step in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if step >= 3:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def print_row(*cells) -> None:
    print("".join(f"{cell!s:>14}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
