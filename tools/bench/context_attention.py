"""Attention of one layer over the context-parallel axis: gathering, local chunk first, ring."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from unittest import mock

import torch

from megalard.model.attention import attend
from megalard.parallel.collectives import all_gather_tokens
from megalard.parallel.context import attention as context_attention
from megalard.parallel.context.attention import attend_local_chunk_first
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Axis
from tools.bench.agreement import check_agreement
from tools.bench.results import Table
from tools.bench.ring_attention import ring_attention
from tools.bench.timing import slowest_rank_seconds

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, SequenceShard], torch.Tensor]
"""Takes q, k and v of this rank's chunk, [b, h, s / P, d]; returns [b, s / P, h, d]."""


def gather_first(q, k, v, shard: SequenceShard) -> torch.Tensor:
    """Gather K and V, as the trainer does where documents are packed."""
    return attend(q, shard.gather(k), shard.gather(v), _one_document(shard), None)


def gather_first_without_transfers(q, k, v, shard: SequenceShard) -> torch.Tensor:
    """Do the same work on copies of the local chunk."""
    k, v = (x.repeat(1, 1, shard.axis.size, 1) for x in (k, v))
    return attend(q, k, v, _one_document(shard), None)


def local_chunk_first(q, k, v, shard: SequenceShard) -> torch.Tensor:
    """Attend to the local chunk while K and V arrive, as the trainer does with one document."""
    if shard.axis.size == 1:
        return gather_first(q, k, v, shard)
    return attend_local_chunk_first(q, k, v, shard.axis)


def ring(q, k, v, shard: SequenceShard) -> torch.Tensor:
    """Pass K and V round a ring."""
    return ring_attention(q, k, v, shard.axis).transpose(1, 2)


def _one_document(shard: SequenceShard):
    return shard.spans(((0, 0, shard.length),))


class ArrivedTensor:
    """A stand-in for ``PendingCollective`` that returns random numbers at once."""

    def __init__(self, x: torch.Tensor, tokens: int):
        self._result = _random((tokens, *x.shape[1:]), x.dtype, x.device)

    def wait(self) -> torch.Tensor:
        return self._result


@cache
def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Made once, so that it takes none of the measured time.
    return torch.randn(shape, dtype=dtype, device=device)


def no_transfers() -> AbstractContextManager:
    """Return a context in which ``local_chunk_first`` exchanges nothing."""
    return mock.patch.multiple(
        context_attention,
        start_all_gather_tokens=lambda x, axis: ArrivedTensor(x, x.shape[0] * axis.size),
        start_reduce_scatter_tokens=lambda x, axis: ArrivedTensor(x, x.shape[0] // axis.size),
    )


def measure(
    options: argparse.Namespace, length: int, axis: Axis, device: torch.device
) -> dict[str, float]:
    """Compare and time all ways; a collective call over the axis.

    Returns:
        Seconds, and on a GPU the peak bytes of the fullest rank beyond q, k and v.
    """
    shard = SequenceShard(length, axis)
    shape = (1, shard.local_length, options.heads, options.head_dim)
    dtype = getattr(torch, options.dtype)
    *qkv, upstream = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    # In memory the tensors are ordered as the output of a projection.
    qkv = [x.transpose(1, 2).requires_grad_() for x in qkv]

    def step(attention: Attention) -> list[torch.Tensor]:
        output = attention(*qkv, shard)
        return [output.detach(), *torch.autograd.grad(output, qkv, upstream)]

    def step_without_transfers(attention: Attention) -> list[torch.Tensor]:
        with no_transfers():
            return step(attention)

    def seconds(work: Callable[[], object]) -> float:
        return slowest_rank_seconds(work, axis, device, options.repeats)

    expected = step(gather_first)
    for attention in (local_chunk_first, ring):
        check_agreement(expected, step(attention), attention.__name__, axis)
    del expected
    result: dict[str, float] = {"tokens": length, "ranks": axis.size}
    for attention in (gather_first, gather_first_without_transfers, local_chunk_first, ring):
        name = attention.__name__
        if device.type == "cuda":
            result[f"{name}_peak_bytes"] = _peak_bytes(lambda a=attention: step(a), axis, device)
        result[f"{name}_seconds"] = seconds(lambda a=attention: step(a))
    result["local_chunk_first_without_transfers_seconds"] = seconds(
        lambda: step_without_transfers(local_chunk_first)
    )
    return result


def _peak_bytes(work: Callable[[], object], axis: Axis, device: torch.device) -> int:
    """Return the peak bytes that a second run allocates on the fullest rank."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    peak = torch.tensor([torch.cuda.max_memory_allocated() - before], device=device)
    return int(all_gather_tokens(peak, axis).max())


class Report:
    """A table of the results, which rank 0 prints as they come."""

    def __init__(self, is_rank_0: bool):
        self._table = None
        if is_rank_0:
            print("attention of one layer, forward and backward; GiB beyond q, k and v\n")
            self._table = Table(
                "tokens", "ranks",
                "gathering, ms", "not hidden", "GiB",
                "local first, ms", "not hidden", "GiB",
                "ring, ms", "GiB",
            )  # fmt: skip

    def add(self, result: dict) -> None:
        """Print one result."""
        if self._table is None:
            return

        def milliseconds(name: str) -> str:
            return f"{result[f'{name}_seconds'] * 1e3:.2f}"

        def exposed(name: str) -> str:
            without = result[f"{name}_without_transfers_seconds"]
            return f"{max(0.0, 1 - without / result[f'{name}_seconds']):.1%}"

        def gib(name: str) -> str:
            peak = result.get(f"{name}_peak_bytes")
            return "" if peak is None else f"{peak / 2**30:.2f}"

        overlapping = ("gather_first", "local_chunk_first")
        cells = [cell for n in overlapping for cell in (milliseconds(n), exposed(n), gib(n))]
        self._table.row(
            f"{result['tokens']:,}", result["ranks"], *cells, milliseconds("ring"), gib("ring")
        )
