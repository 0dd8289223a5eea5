"""Ring attention over the cp axis, the reference of ``tools.bench.context --attention``.

K and V travel round the ring of ranks (Liu et al., arXiv 2310.01889), with the zigzag of
``megalard.parallel.context.shard``, as in the package ring-flash-attention. Each rank attends to
the chunk that it has and merges the results by their log-sum-exp. In the backward pass K and V
travel again, and the gradients of each chunk follow one hop behind it. The ring is causal and takes
one document. docs/context_parallel.md says why the trainer gathers K and V instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megalard.model.merged_attention import attention_part, attention_part_backward, merge
from megalard.parallel.context.exchange import Exchange
from megalard.parallel.mesh import Axis


def ring_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return causal attention [b, h, s / P, d] of this rank's chunk to a block of one document.

    Args:
        q, k, v: this rank's chunk, [b, h, s / P, d] each.
    """
    return _RingAttention.apply(q, k, v, axis)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, axis):
        out = lse = None
        for source, k_chunk, v_chunk in _chunks_in_turn(k, v, axis):
            rows, columns, causal = _visible(q.shape[2], axis.rank, source)
            part = attention_part(
                q[:, :, rows], k_chunk[:, :, columns], v_chunk[:, :, columns], causal
            )
            if out is None:  # the local chunk, in which every row sees itself
                out, lse = part
                continue
            out[:, :, rows], lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], *part)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.axis = axis
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        axis, grad = ctx.axis, grad.contiguous()
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        chunk_grads = None  # of the present chunk, from the ranks that it has visited
        for source, k_chunk, v_chunk in _chunks_in_turn(k, v, axis):
            if chunk_grads is None:
                chunk_grads = [x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v)]
            else:
                chunk_grads = _pass_on(chunk_grads, axis).wait()
            rows, columns, causal = _visible(q.shape[2], axis.rank, source)
            part_q, *parts = attention_part_backward(
                grad[:, :, rows], q[:, :, rows], out[:, :, rows], lse[:, :, rows],
                k_chunk[:, :, columns], v_chunk[:, :, columns], causal,
            )  # fmt: skip
            grad_q[:, :, rows] += part_q
            for total, part in zip(chunk_grads, parts, strict=True):
                total[:, :, columns] += part
        if axis.size > 1:  # the last hop, back to the owner of the chunk
            chunk_grads = _pass_on(chunk_grads, axis).wait()
        return grad_q.to(q.dtype), *(x.to(k.dtype) for x in chunk_grads), None


def _pass_on(tensors: list[torch.Tensor], axis: Axis) -> Exchange:
    """Start to exchange tensors: this rank's go to the next rank, the previous rank's arrive."""
    return Exchange(tensors, (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size, axis)


def _chunks_in_turn(
    k: torch.Tensor, v: torch.Tensor, axis: Axis
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the owner, K and V of each chunk, the local one first; the next travels meanwhile."""
    chunk = [k.contiguous(), v.contiguous()]
    for step in range(axis.size):
        following = _pass_on(chunk, axis) if step + 1 < axis.size else None
        yield (axis.rank - step) % axis.size, chunk[0], chunk[1]
        if following is not None:
            chunk = following.wait()


def _visible(length: int, rank: int, source: int) -> tuple[slice, slice, bool]:
    """Return the rows and columns of two chunks that see each other, and whether causally.

    A chunk is an early and a late piece. All rows see the early piece of a lower rank's chunk. The
    late rows see both pieces of a higher rank's chunk.
    """
    if source == rank:
        return slice(None), slice(None), True
    half = length // 2
    if source < rank:
        return slice(None), slice(0, half), False
    return slice(half, None), slice(None), False
