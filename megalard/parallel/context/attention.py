"""Causal attention over the cp axis: each rank's queries, the keys and values of all ranks.

Where one document fills every row of the block, a rank's own chunk is attended to while the others'
keys and values are on their way, and its gradients are computed while theirs are. Everything else
gathers first (``SequenceShard.gather``) and attends then.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megalard.model import attention
from megalard.model.merged_attention import (
    attention_part,
    attention_part_backward,
    merge,
    takes_cudnn,
)
from megalard.parallel.collectives import post_all_gather_tokens, post_reduce_scatter_tokens
from megalard.parallel.context.shard import SequenceShard, Span
from megalard.parallel.mesh import Axis


def attend_over_axis(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    *,
    shard: SequenceShard,
    documents: tuple[tuple[int, int, int], ...],
    spans: tuple[Span, ...],
) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(d)) v within each document. A collective call over the shard's axis.

    Args:
        q, k, v: [b, Hq, s, d] and [b, Hkv, s, d] of this rank's s tokens, Hq a multiple of Hkv.
        window: query i sees key j only if i - j < window; None for all j <= i.
        documents: (row, start, end) in the whole block.
        spans: this rank's parts of them, ``shard.spans(documents)``.

    Returns:
        [b, s, Hq, d], contiguous; zeros for queries outside all documents.
    """
    if _attends_own_chunk_first(q, k, v, window, shard, documents):
        return attend_own_chunk_first(q, k, v, shard.axis)
    return attention.attend(q, shard.gather(k), shard.gather(v), spans, window)


def attend_own_chunk_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, axis: Axis
) -> torch.Tensor:
    """Causal attention where each row of the block is one document; two ranks or more.

    Args:
        q, k, v: [b, Hq, s, d] and [b, Hkv, s, d] of this rank's chunk, for kernels as
            ``attention_part`` calls them.

    Returns:
        [b, s, Hq, d], contiguous.
    """
    return _OwnChunkFirst.apply(q, k, v, axis)


def _attends_own_chunk_first(q, k, v, window, shard: SequenceShard, documents) -> bool:
    """The same on every rank, which all take part in the same collectives."""
    rows = q.shape[0]
    if shard.axis.size == 1 or len(documents) != rows:
        return False
    if any(end - start != shard.length for _, start, end in documents):
        return False
    if window is not None and window < shard.length:
        return False
    if not q.is_cuda:
        return True
    # pieces that, gathered first, are four calls of cuDNN's, and here three of the same work
    long = shard.piece_length >= attention.LONG_QUERIES
    half = q.dtype != torch.float32 and attention.flash_attn_varlen_func is None
    return half and long and takes_cudnn(q, k, v)


class _OwnChunkFirst(torch.autograd.Function):
    """All-gather of k and v forward, reduce-scatter of their gradients backward.

    Both under the attention of the own chunk to itself: its two pieces stand in the order of the
    sequence, so that is one triangle. Gathered k and v are [P s, b, Hkv, d], tokens first and in
    the order of the ranks, as they arrive. The parts merge by their rows' log-sum-exp, as in
    ``megalard.model.merged_attention``.
    """

    @staticmethod
    def forward(ctx, q, k, v, axis):
        posted = [post_all_gather_tokens(_tokens_first(x), axis) for x in (k, v)]
        out, lse = attention_part(q, k, v, True)
        k, v = (_by_pieces(x.wait(), axis) for x in posted)
        for rows, pieces in _fetched(axis, q.shape[2]):
            found = attention_part(q[:, :, rows], _take(k, pieces), _take(v, pieces), False)
            out[:, :, rows], lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], *found)
        out = out.transpose(1, 2).contiguous()
        ctx.axis = axis
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        axis, grad, out = ctx.axis, grad.transpose(1, 2), out.transpose(1, 2)
        grad_q, *of_others = map(torch.zeros_like, (q, k, v))
        for rows, pieces in _fetched(axis, q.shape[2]):
            of_rows = (x[:, :, rows] for x in (grad, q, out, lse))
            part_q, *parts = attention_part_backward(
                *of_rows, _take(k, pieces), _take(v, pieces), False
            )
            grad_q[:, :, rows] += part_q
            for total, part in zip(of_others, parts, strict=True):
                to = total[pieces]
                to.copy_(_tokens_first(part).unflatten(0, to.shape[:3]))
        posted = [post_reduce_scatter_tokens(x.flatten(0, 2), axis) for x in of_others]
        own = slice(axis.rank, axis.rank + 1)
        part_q, *parts = attention_part_backward(
            grad, q, out, lse, _take(k, own), _take(v, own), True
        )
        grad_k, grad_v = (
            part + _heads_first(x.wait()) for part, x in zip(parts, posted, strict=True)
        )
        return grad_q + part_q, grad_k, grad_v, None


def _fetched(axis: Axis, length: int) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """Which of the chunk's rows see which pieces of other ranks, all without a mask.

    All rows see the early pieces of lower ranks; the late piece's see the chunks of higher ranks,
    whose pieces lie between the own two. The pieces are an index into [P, 2, ...].
    """
    if axis.rank > 0:
        yield slice(None), (slice(0, axis.rank), slice(0, 1))
    if axis.rank + 1 < axis.size:
        yield slice(length // 2, None), (slice(axis.rank + 1, None), slice(None))


def _by_pieces(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[P s, ...] of all chunks to [P, 2, s / 2, ...]."""
    return x.unflatten(0, (axis.size, 2, -1))


def _take(x: torch.Tensor, pieces) -> torch.Tensor:
    """Of [P, 2, s / 2, b, h, d] the tokens of some pieces: [b, h, tokens, d].

    A view for whole chunks; early pieces of several ranks do not stand at one stride, and are
    copied.
    """
    return _heads_first(x[pieces].flatten(0, 2))


def _tokens_first(x_bhsd: torch.Tensor) -> torch.Tensor:
    return x_bhsd.permute(2, 0, 1, 3)


def _heads_first(x_sbhd: torch.Tensor) -> torch.Tensor:
    return x_sbhd.permute(1, 2, 0, 3)
