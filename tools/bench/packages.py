"""flash-attn and apex next to what megalard uses without them: attention, norm and optimizer.

Each line compares one kernel with the float64 result on a small input, and gives its time on a
large one. ``chosen`` is what a run uses with the packages that are installed here. Forward and
backward passes are timed together.

    python -m tools.bench.packages
    python -m tools.bench.packages --parts attention --repeats 20 --json packages.json

The effect on a step is that of ``tools.bench.step``, run with and without the packages.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megalard import cli
from tools import command_line

PARTS = ("attention", "norm", "optimizer")


@dataclass(frozen=True)
class Case:
    """Attention of a batch.

    Attributes:
        name: what the table calls it.
        heads, kv_heads, head_dim: the shape of q, k and v.
        rows, tokens: blocks, and tokens of each.
        documents: the lengths of the documents of a block, as shares of it.
        window: the sliding window, as a share of the block; None for none.
    """

    name: str
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    rows: int = 1
    tokens: int = 32768
    documents: tuple[float, ...] = (1.0,)
    window: float | None = None

    def spans(self, tokens: int) -> list:
        """Return the documents of all rows, where a row has ``tokens`` tokens."""
        from megalard.parallel.context.shard import SequenceShard
        from megalard.parallel.mesh import SINGLE

        ends = [0]
        for share in self.documents:
            ends.append(min(tokens, ends[-1] + max(1, round(share * tokens))))
        ends[-1] = tokens
        documents = [
            (row, start, end)
            for row in range(self.rows)
            for start, end in itertools.pairwise(ends)
            if end > start
        ]
        return list(SequenceShard(tokens, SINGLE).spans(documents))


_MIXED = (0.31, 0.02, 0.17, 0.05, 0.24, 0.01, 0.12, 0.08)
_SHORT = (1 / 16,) * 16
CASES = (
    Case("8 blocks of 4K", rows=8, tokens=4096),
    Case("8 blocks of 4K, all heads", kv_heads=32, rows=8, tokens=4096),
    Case("8 blocks of 4K, packed", rows=8, tokens=4096, documents=_MIXED),
    Case("8 blocks of 4K, 16 documents each", rows=8, tokens=4096, documents=_SHORT),
    Case("32K", tokens=32768),
    Case("32K, packed", tokens=32768, documents=_MIXED),
    Case("32K, window of 4K", tokens=32768, window=1 / 8),
    Case("32K, heads of 64", heads=9, kv_heads=3, head_dim=64),
    Case("32K, heads of 64, packed", heads=9, kv_heads=3, head_dim=64, documents=_MIXED),
)
_SMALL_TOKENS = 256


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = parse(arguments)
    return cli.run(lambda: run(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_line.make_parser("tools.bench.packages", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to compare")
    parser.add_argument(
        "--scale",
        type=command_line.at_least(1),
        default=1,
        metavar="N",
        help="divide the lengths by this, for small machines",
    )
    command_line.add_device(parser)
    command_line.add_repeats(parser, 10)
    command_line.add_json(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure and report."""
    from megalard.parallel.mesh import pick_device
    from tools.bench.results import describe_environment, print_environment, write_json

    device = pick_device(options.device, 0)
    environment = describe_environment(device) | packages()
    print_environment(environment)
    results: list[dict] = []
    for part in options.parts:
        results += MEASUREMENTS[part](options, device)
    if options.json:
        write_json(options.json, environment, options, results)


def packages() -> dict[str, str]:
    """Return the versions of the optional packages."""
    from importlib import import_module

    versions = {}
    modules = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_3", "apex": "amp_C"}
    for name, module in modules.items():
        try:
            versions[name] = getattr(import_module(module), "__version__", "installed")
        except ImportError:
            versions[name] = "not installed"
    return versions


def measure_attention(options: argparse.Namespace, device: Any) -> list[dict]:
    """Compare the kernels of attention on every case."""
    results = []
    for case in CASES:
        print(
            f"\nattention, {case.name}: {case.heads} and {case.kv_heads} heads of {case.head_dim}"
        )
        small = _attention_inputs(case, _SMALL_TOKENS, device)
        large = _attention_inputs(case, case.tokens // options.scale, device)
        reference = _values_and_gradients(_dense, small)
        results += _compare(
            "attention", case.name, _attention_kernels(device), small, large, reference, options
        )
    return results


def _attention_inputs(case: Case, tokens: int, device: Any) -> tuple:
    import torch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    leaves = [
        torch.randn(case.rows, heads, tokens, case.head_dim, device=device, dtype=dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    ]
    window = None if case.window is None else max(1, round(case.window * tokens))
    return leaves, (case.spans(tokens), window)


def _attention_kernels(device: Any) -> dict[str, Callable]:
    """Return what can compute attention here, by name; ``chosen`` is what a run uses."""
    from megalard.model import attention, variable_length

    kernels: dict[str, Callable] = {"chosen": attention.attend}
    if device.type == "cuda":

        def of(kernel: Callable) -> Callable:
            def attend(q, k, v, spans, window):
                return variable_length.variable_length_attention(kernel, q, k, v, spans, window)

            return attend

        kernels["torch varlen"] = of(variable_length.torch_attention)
        if variable_length.flash_attn_varlen_func is not None:
            kernels["flash-attn 2"] = of(variable_length.flash_attention)
        if variable_length.flash_attn_3_varlen_func is not None:
            kernels["flash-attn 3"] = of(variable_length.flash_attention_3)
        kernels["per document"] = attention.attend_span_by_span
        kernels["without packages"] = _without_packages
    return kernels


def _without_packages(q, k, v, spans, window):
    """Return what a run computes where no package is installed."""
    from unittest import mock

    from megalard.model import attention, variable_length

    with mock.patch.multiple(
        variable_length, flash_attn_varlen_func=None, flash_attn_3_varlen_func=None
    ):
        return attention.attend(q, k, v, spans, window)


def _dense(q, k, v, spans, window):
    """Return attention in float64 with all scores in memory."""
    import torch

    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    rows = []
    for row in range(len(q)):
        parts = []
        for span in spans:
            if span.row == row:
                place = torch.arange(span.end - span.start, device=q.device)
                distance = place[:, None] - place
                is_seen = (distance >= 0) & (distance < (window or q.shape[2] + 1))
                inside = slice(span.start, span.end)
                scores = q[row, :, inside] @ k[row, :, inside].mT * q.shape[3] ** -0.5
                weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
                parts.append((weights @ v[row, :, inside]).transpose(0, 1))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def measure_norm(options: argparse.Namespace, device: Any) -> list[dict]:
    """Compare the root-mean-square norms of 4096 features."""
    import torch
    import torch.nn.functional as F

    from megalard.model import norm

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernels: dict[str, Callable] = {"torch": lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)}
    if norm.apex_rms_norm is not None and device.type == "cuda":
        kernels["apex"] = lambda x, w: norm.apex_rms_norm(x, w, w.shape, 1e-5)

    def inputs(tokens: int) -> tuple:
        torch.manual_seed(0)
        x = torch.randn(tokens, 4096, device=device, dtype=dtype)
        return [x, torch.randn(4096, device=device, dtype=dtype)], ()

    def exact(x, w):
        x = x.double()
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()

    print("\nnorm of 32768 tokens of 4096 features")
    small, large = inputs(512), inputs(32768 // options.scale)
    reference = _values_and_gradients(exact, small)
    return _compare("norm", "32768 x 4096", kernels, small, large, reference, options)


def measure_optimizer(options: argparse.Namespace, device: Any) -> list[dict]:
    """Compare the updates of 224 tensors of LoRA, and of 16 buckets of all weights."""
    import torch

    from megalard.config.schema import OptimizerConfig
    from megalard.training import apex_adamw
    from megalard.training.optimizer import update_where
    from tools.bench.results import Table
    from tools.bench.timing import time_runs

    settings = OptimizerConfig()
    classes: dict[str, Callable] = {"torch": lambda p, **s: torch.optim.AdamW(p, fused=True, **s)}
    if apex_adamw.multi_tensor_adam_capturable is not None and device.type == "cuda":
        classes["apex"] = apex_adamw.ApexAdamW
    results = []
    for name, count, elements in (("LoRA", 224, 1 << 20), ("all weights", 16, 1 << 26)):
        print(f"\noptimizer, {name}: {count} tensors of {elements // options.scale} fp32 values")
        table = Table(("kernel", 12), "ms", ("range, ms", 16), "error")
        expected = None
        for kernel, make in classes.items():
            torch.manual_seed(0)
            parameters = [
                torch.nn.Parameter(torch.randn(elements // options.scale, device=device) / 100)
                for _ in range(count)
            ]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer = make(
                parameters, lr=settings.learning_rate, betas=tuple(settings.betas), eps=settings.eps
            )
            finite = torch.ones((), dtype=torch.bool, device=device)
            before = parameters[0].detach().double()
            update_where(finite, optimizer)
            gradient = parameters[0].grad.double()
            # The first step of Adam, and torch's default weight decay of 0.01.
            direction = gradient / (gradient.abs() + settings.eps) + 0.01 * before
            expected = before - settings.learning_rate * direction
            error = _relative(parameters[0].detach() - before, expected - before)
            update = functools.partial(update_where, finite, optimizer)
            time = time_runs(update, device, options.repeats)
            table.row(kernel, *_times(time), f"{error:.1e}")
            results.append(_result("optimizer", name, kernel, time, {"update": error}))
            del update, optimizer, parameters
    return results


def _compare(
    part: str,
    name: str,
    kernels: dict[str, Callable],
    small: tuple,
    large: tuple,
    reference: list,
    options: argparse.Namespace,
) -> list[dict]:
    """Print and return the time of each kernel on large inputs, and its errors on small ones."""
    from tools.bench.results import Table
    from tools.bench.timing import time_runs

    table = Table(("kernel", 12), "ms", ("range, ms", 16), "out", ("gradients", 26))
    results = []
    for kernel, function in kernels.items():
        try:
            values = _values_and_gradients(function, small)
            errors = [_relative(a, b) for a, b in zip(values, reference, strict=True)]
            device = large[0][0].device
            run_large = functools.partial(_values_and_gradients, function, large)
            time = time_runs(run_large, device, options.repeats)
        except (RuntimeError, TypeError) as error:
            table.row(kernel)
            print(f"    {str(error).splitlines()[0]}")
            continue
        gradients = " ".join(f"{error:.1e}" for error in errors[1:])
        table.row(kernel, *_times(time), f"{errors[0]:.1e}", gradients)
        names = ["out", *(f"gradient {number}" for number in range(len(errors) - 1))]
        results.append(_result(part, name, kernel, time, dict(zip(names, errors, strict=True))))
    return results


def _values_and_gradients(function: Callable, inputs: tuple) -> list:
    """Return the output of a function, and the gradients by its tensors."""
    import torch

    tensors, others = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, *others)
    # The upstream gradient is the same for every function.
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _relative(actual, expected) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


def _times(time: Any) -> tuple[str, str]:
    return (
        f"{time.median * 1e3:.3g}",
        f"{time.shortest * 1e3:.3g} - {time.longest * 1e3:.3g}",
    )


def _result(part: str, case: str, kernel: str, time: Any, errors: dict[str, float]) -> dict:
    return {
        "part": part,
        "case": case,
        "kernel": kernel,
        "seconds": time.median,
        "shortest": time.shortest,
        "longest": time.longest,
        "errors": errors,
    }


MEASUREMENTS = {
    "attention": measure_attention,
    "norm": measure_norm,
    "optimizer": measure_optimizer,
}


if __name__ == "__main__":
    sys.exit(main())
