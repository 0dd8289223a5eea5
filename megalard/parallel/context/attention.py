"""Causal attention over the cp axis: this rank's queries, the keys and values of all ranks.

If every block of the batch is one document, a rank attends to its own chunk while the keys and
values of the other ranks arrive, and computes the gradients of its own chunk while the other
gradients are exchanged. In all other cases keys and values are gathered first
(``SequenceShard.gather``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from megalard.model import attention
from megalard.model.merged_attention import (
    attention_part,
    attention_part_backward,
    merge,
    uses_cudnn,
)
from megalard.model.ops import BlockBatch
from megalard.parallel.collectives import start_all_gather_tokens, start_reduce_scatter_tokens
from megalard.parallel.context.shard import SequenceShard, Span
from megalard.parallel.mesh import Axis


class ShardedBatch(BlockBatch, Protocol):
    """What attention needs to know of a batch; see ``megalard.data.batch.Batch``.

    Attributes:
        shard: which tokens of a block are this rank's.
        documents: (row, start, end) of every document: the block's place in the batch, and the
            document's positions in the block.
        spans: this rank's queries in these documents.
    """

    @property
    def shard(self) -> SequenceShard: ...

    @property
    def documents(self) -> tuple[tuple[int, int, int], ...]: ...

    @property
    def spans(self) -> tuple[Span, ...]: ...


def attend_over_axis(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, batch: ShardedBatch
) -> torch.Tensor:
    """Return softmax(q kᵀ / sqrt(d)) v within each document; a collective call over the cp axis.

    Args:
        q, k, v: [b, Hq, s, d] and [b, Hkv, s, d] of this rank's s tokens; Hq is a multiple of Hkv.
        window: query i sees key j only if i - j < window; None for all j <= i.
        batch: says where the documents are.

    Returns:
        [b, s, Hq, d], contiguous; zeros for queries outside all documents.
    """
    shard = batch.shard
    if _overlaps_exchange(q, k, v, window, shard, batch.documents):
        return attend_local_chunk_first(q, k, v, shard.axis)
    return attention.attend(q, shard.gather(k), shard.gather(v), batch.spans, window)


def attend_local_chunk_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, axis: Axis
) -> torch.Tensor:
    """Return causal attention of blocks that are one document each, over two ranks or more.

    Args:
        q, k, v: [b, Hq, s, d] and [b, Hkv, s, d] of this rank's chunk, of a dtype and on a device
            that ``attention_part`` supports.
        axis: the cp axis.

    Returns:
        [b, s, Hq, d], contiguous.
    """
    return _LocalChunkFirst.apply(q, k, v, axis)


def _overlaps_exchange(q, k, v, window, shard: SequenceShard, documents) -> bool:
    """Whether to attend to the local chunk first. The answer is the same on every rank."""
    rows = q.shape[0]
    if shard.axis.size == 1 or len(documents) != rows:
        return False
    if any(end - start != shard.length for _, start, end in documents):
        return False
    if window is not None and window < shard.length:
        return False
    if not q.is_cuda:
        return True
    # Pieces of this length take four cuDNN calls if they are gathered first, and three here.
    is_long = shard.piece_length >= attention.LONG_QUERIES
    return q.dtype != torch.float32 and is_long and uses_cudnn(q, k, v)


class _LocalChunkFirst(torch.autograd.Function):
    """All-gather of k and v forward, reduce-scatter of their gradients backward.

    Both exchanges overlap the attention of the local chunk to itself, which is one causal triangle
    because the two pieces of a chunk are in the order of the sequence. Gathered k and v are
    [P s, b, Hkv, d], tokens first and in the order of the ranks, as they arrive. The results merge
    by the log-sum-exp of each row, as in ``megalard.model.merged_attention``.
    """

    @staticmethod
    def forward(ctx, q, k, v, axis):
        pending = [start_all_gather_tokens(_tokens_first(x), axis) for x in (k, v)]
        out, lse = attention_part(q, k, v, True)
        k, v = (_by_pieces(x.wait(), axis) for x in pending)
        for rows, pieces in _remote_parts(axis, q.shape[2]):
            part = attention_part(q[:, :, rows], _take(k, pieces), _take(v, pieces), False)
            out[:, :, rows], lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], *part)
        out = out.transpose(1, 2).contiguous()
        ctx.axis = axis
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        axis, grad, out = ctx.axis, grad.contiguous().transpose(1, 2), out.transpose(1, 2)
        grad_q, *remote_grads = map(torch.zeros_like, (q, k, v))
        for rows, pieces in _remote_parts(axis, q.shape[2]):
            row_tensors = (x[:, :, rows] for x in (grad, q, out, lse))
            part_q, *parts = attention_part_backward(
                *row_tensors, _take(k, pieces), _take(v, pieces), False
            )
            grad_q[:, :, rows] += part_q
            for total, part in zip(remote_grads, parts, strict=True):
                target = total[pieces]
                target.copy_(_tokens_first(part).unflatten(0, target.shape[:3]))
        pending = [start_reduce_scatter_tokens(x.flatten(0, 2), axis) for x in remote_grads]
        local = slice(axis.rank, axis.rank + 1)
        part_q, *parts = attention_part_backward(
            grad, q, out, lse, _take(k, local), _take(v, local), True
        )
        grad_k, grad_v = (
            part + _heads_first(x.wait()) for part, x in zip(parts, pending, strict=True)
        )
        return grad_q + part_q, grad_k, grad_v, None


def _remote_parts(axis: Axis, length: int) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """Yield which rows of the local chunk see which pieces of other ranks; no part needs a mask.

    All rows see the early pieces of lower ranks. The rows of the late piece see the chunks of
    higher ranks, whose pieces lie between the two local pieces. The pieces are an index into
    [P, 2, ...].
    """
    if axis.rank > 0:
        yield slice(None), (slice(0, axis.rank), slice(0, 1))
    if axis.rank + 1 < axis.size:
        yield slice(length // 2, None), (slice(axis.rank + 1, None), slice(None))


def _by_pieces(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """View [P s, ...] of all chunks as [P, 2, s / 2, ...]."""
    return x.unflatten(0, (axis.size, 2, -1))


def _take(x: torch.Tensor, pieces) -> torch.Tensor:
    """Return the tokens of some pieces of [P, 2, s / 2, b, h, d] as [b, h, tokens, d].

    The result is a view for whole chunks. Early pieces of several ranks are not evenly spaced in
    memory and are copied.
    """
    return _heads_first(x[pieces].flatten(0, 2))


def _tokens_first(x_bhsd: torch.Tensor) -> torch.Tensor:
    return x_bhsd.permute(2, 0, 1, 3)


def _heads_first(x_sbhd: torch.Tensor) -> torch.Tensor:
    return x_sbhd.permute(1, 2, 0, 3)
