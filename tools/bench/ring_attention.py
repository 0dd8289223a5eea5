"""Ring attention over the cp axis, for ``bench_context.py --attention`` to compare with.

Liu et al. (2310.01889) with the zigzag of megalard's chunks, as in ring-flash-attention: K and V
travel round the ring, each rank attends to what is there and merges by log-sum-exp; backward they
travel again, with their gradients behind them. Causal and one document only. The trainer gathers
K and V instead: docs/context_parallel.md says why.
"""

from __future__ import annotations

import torch

from megalard.model.merged_attention import attention_part, attention_part_backward, merge
from megalard.parallel.context.shard import Exchange
from megalard.parallel.mesh import Axis


class RingAttention(torch.autograd.Function):
    """``RingAttention.apply(q, k, v, axis)`` with this rank's chunk, [b, h, s / P, d] each."""

    @staticmethod
    def forward(ctx, q, k, v, axis: Axis):
        out = lse = None
        for source, k_now, v_now in _round(k, v, axis):
            rows, columns, causal = _parts(q.shape[2], axis.rank, source)
            found = attention_part(
                q[:, :, rows], k_now[:, :, columns], v_now[:, :, columns], causal
            )
            if out is None:  # the own chunk, in which every row sees itself
                out, lse = found
                continue
            out[:, :, rows], lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], *found)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.axis = axis
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        axis, grad = ctx.axis, grad.contiguous()
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        behind = None  # the gradients of the chunk at hand, so far
        for source, k_now, v_now in _round(k, v, axis):
            if behind is not None:
                # those of this chunk, which come from the rank that had it before
                behind = _pass_on(behind, axis).wait()
            else:
                behind = [x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v)]
            rows, columns, causal = _parts(q.shape[2], axis.rank, source)
            parts = attention_part_backward(
                grad[:, :, rows], q[:, :, rows], out[:, :, rows], lse[:, :, rows],
                k_now[:, :, columns], v_now[:, :, columns], causal,
            )  # fmt: skip
            grad_q[:, :, rows] += parts[0]
            for total, part in zip(behind, parts[1:], strict=True):
                total[:, :, columns] += part
        if axis.size > 1:
            behind = _pass_on(behind, axis).wait()
        return grad_q.to(q.dtype), *(x.to(k.dtype) for x in behind), None


def _pass_on(tensors: list[torch.Tensor], axis: Axis) -> Exchange:
    return Exchange(tensors, (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size, axis)


def _round(k, v, axis: Axis):
    """Each chunk's rank and its k and v, the own first; the next is on its way meanwhile."""
    now = [k.contiguous(), v.contiguous()]
    for step in range(axis.size):
        following = _pass_on(now, axis) if step + 1 < axis.size else None
        yield (axis.rank - step) % axis.size, *now
        if following is not None:
            now = following.wait()


def _parts(length: int, rank: int, source: int) -> tuple[slice, slice, bool]:
    """Rows and columns of two chunks that see each other, and whether causally.

    A chunk is an early and a late piece. Against a chunk of a lower rank every row sees the early
    piece; against one of a higher rank the late rows see both.
    """
    if source == rank:
        return slice(None), slice(None), True
    half = length // 2
    if source < rank:
        return slice(None), slice(0, half), False
    return slice(half, None), slice(None), False
