"""The speed of the relation's kernels next to attention's, on the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalard.kernels.relation_kl import (
    IntervalMask,
    causal_mask,
    relation_backward,
    relation_forward,
    segment_mask,
)
from megalard.kernels.relation_kl.operands import check_operands
from megalard.kernels.relation_kl.triton import backend as triton_backend
from tools.bench.results import Table
from tools.bench.timing import MatrixProduct, time_runs

Passes = tuple[Callable[[], object], Callable[[], object]]
"""The forward and the backward pass of an operation."""

# Forward and backward; see the docstring of ``tools.bench.relation``.
HALF_PRODUCTS = {"relation": (2, 4), "Triton relation": (2, 4), "attention": (2, 5)}
# Lengths of packed documents, as shares of the sequence.
_DOCUMENTS = (0.31, 0.02, 0.17, 0.05, 0.24, 0.01, 0.12, 0.08)


@dataclass(frozen=True)
class Shape:
    """A shape to time. Grouped heads are timed as the relation of queries to keys.

    Attributes:
        heads, kv_heads: the heads of the rows and of the columns.
        head_dim: features per head.
        is_packed: whether the sequence is several documents.
    """

    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    is_packed: bool = False

    def documents(self, tokens: int) -> list[int]:
        """Return the lengths of the documents of a sequence."""
        if not self.is_packed:
            return [tokens]
        lengths = [int(share * tokens) for share in _DOCUMENTS[:-1]]
        lengths = [length for length in lengths if length > 0]
        return [*lengths, tokens - sum(lengths)]

    def pairs(self, tokens: int) -> int:
        """Return the number of pairs of tokens that causal attention sees, n² / 2 per document."""
        return sum(length * length // 2 for length in self.documents(tokens))


SHAPES = {
    "d128": Shape(),
    "d64": Shape(head_dim=64),
    "grouped": Shape(kv_heads=8),
    "packed": Shape(is_packed=True),
}


def measure_speed(
    name: str, lengths: list[int], repeats: int, product: MatrixProduct, device: torch.device
) -> list[dict]:
    """Measure and print both passes of every operation at one shape.

    Returns:
        One result per length, operation and pass. An operation that cannot run, because memory
        or a kernel is missing, is printed with the reason and has no result.
    """
    shape = SHAPES[name]
    print(
        f"\n{name}: {shape.heads} and {shape.kv_heads} heads of {shape.head_dim}, "
        f"{'packed documents' if shape.is_packed else 'one document'}"
    )
    table = Table(
        "tokens", ("operation", 15), "pass", "ms", ("range, ms", 16), "TFLOP/s", "of product",
        "of attention",
    )  # fmt: skip
    results = []
    for tokens in lengths:
        attention_rates: dict[str, float] = {}
        for operation in operations_on(device):
            try:
                passes = OPERATIONS[operation](shape, tokens, device)
                timed = [time_runs(run, device, repeats) for run in passes]
            except (RuntimeError, torch.OutOfMemoryError) as error:
                table.row(f"{tokens:,}", operation)
                print(f"    {str(error).splitlines()[0]}")
                continue
            for side, halves, seconds in zip(
                ("forward", "backward"), HALF_PRODUCTS[operation], timed, strict=True
            ):
                flops = halves * 2 * shape.heads * shape.pairs(tokens) * shape.head_dim
                rate = flops / seconds.median
                if operation == "attention":
                    attention_rates[side] = rate
                of_attention = rate / attention_rates.get(side, float("nan"))
                result = {
                    "shape": name,
                    "tokens": tokens,
                    "operation": operation,
                    "pass": side,
                    "seconds": asdict(seconds),
                    "flops": rate,
                    "of_product": rate / product.flops,
                    "of_attention": of_attention if side in attention_rates else None,
                }
                results.append(result)
                _print(table, result)
            del passes
    return results


def operations_on(device: torch.device) -> list[str]:
    """Return the operations that a device can run, the reference first."""
    has_triton = triton_backend.why_not_on(device) is None or (
        triton_backend.UNAVAILABLE is None and triton_backend.tiles.INTERPRETED
    )
    return ["attention", *(["Triton relation"] if has_triton else []), "relation"]


def _print(table: Table, result: dict) -> None:
    seconds, of_attention = result["seconds"], result["of_attention"]
    table.row(
        f"{result['tokens']:,}",
        result["operation"],
        result["pass"],
        f"{seconds['median'] * 1e3:.3f}",
        f"{seconds['shortest'] * 1e3:.3f}-{seconds['longest'] * 1e3:.3f}",
        f"{result['flops'] / 1e12:.3g}",
        f"{result['of_product']:.2f}",
        "" if of_attention is None else f"{of_attention:.2f}",
    )


def relation_operands(
    shape: Shape, tokens: int, device: torch.device
) -> tuple[list[Tensor | None], IntervalMask]:
    """Return rows and columns of student and teacher, and the mask.

    The columns are None for a self relation, whose columns are the rows.
    """
    operands = [_random(shape.heads, tokens, shape.head_dim, device) for _ in range(2)]
    is_grouped = shape.kv_heads != shape.heads
    operands += [
        _random(shape.kv_heads, tokens, shape.head_dim, device) if is_grouped else None
        for _ in range(2)
    ]
    if not shape.is_packed:
        return operands, causal_mask(1, tokens, device)
    lengths = torch.tensor(shape.documents(tokens))
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return operands, segment_mask(ids[None].to(device))


def relation_passes(shape: Shape, tokens: int, device: torch.device) -> Passes:
    """Return the relation with the kernels that the trainer chooses."""
    operands, mask = relation_operands(shape, tokens, device)
    lse_s, lse_t, _ = relation_forward(*operands, mask=mask)
    return (
        lambda: relation_forward(*operands, mask=mask),
        lambda: relation_backward(*operands, lse_s, lse_t, mask=mask),
    )


def triton_passes(shape: Shape, tokens: int, device: torch.device) -> Passes:
    """Return the relation with the Triton kernels."""
    operands, mask = relation_operands(shape, tokens, device)
    op = check_operands(*operands, mask, None, None)
    lse_s, lse_t, _ = triton_backend.forward(op, partial=False)
    return (
        lambda: triton_backend.forward(op, partial=False),
        lambda: triton_backend.backward(op, lse_s, lse_t, None, torch.bfloat16),
    )


def attention_passes(shape: Shape, tokens: int, device: torch.device) -> Passes:
    """Return causal attention, with one call per document."""
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    inputs = [
        [_random(h, length, shape.head_dim, device).requires_grad_() for h in heads]
        for length in shape.documents(tokens)
    ]
    is_grouped = shape.kv_heads != shape.heads

    def forward() -> list[Tensor]:
        is_gpu = device.type == "cuda"
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if is_gpu else nullcontext():
            return [
                F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=is_grouped)
                for qkv in inputs
            ]

    outputs = forward()
    upstream = [torch.randn_like(output) for output in outputs]
    return forward, lambda: [
        torch.autograd.grad(output, qkv, gradient, retain_graph=True)
        for output, qkv, gradient in zip(outputs, inputs, upstream, strict=True)
    ]


def _random(heads: int, tokens: int, head_dim: int, device: torch.device) -> Tensor:
    return torch.randn(1, heads, tokens, head_dim, device=device, dtype=torch.bfloat16)


OPERATIONS: dict[str, Callable[[Shape, int, torch.device], Passes]] = {
    "attention": attention_passes,
    "Triton relation": triton_passes,
    "relation": relation_passes,
}
