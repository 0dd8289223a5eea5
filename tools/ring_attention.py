"""Ring attention over the cp axis, for ``bench_context.py --attention`` to compare with.

Liu et al. (2310.01889) with the zigzag of megalard's chunks, as in ring-flash-attention: K and V
travel round the ring, each rank attends to what is there and merges by log-sum-exp; backward they
travel again, with their gradients behind them. Causal and one document only. The trainer gathers
K and V instead: docs/context_parallel.md says why.
"""

from __future__ import annotations

import torch

from megalard.parallel.context import Exchange
from megalard.parallel.mesh import Axis

_aten = torch.ops.aten


class RingAttention(torch.autograd.Function):
    """``RingAttention.apply(q, k, v, axis)`` with this rank's chunk, [b, h, s / P, d] each."""

    @staticmethod
    def forward(ctx, q, k, v, axis: Axis):
        out, lse = torch.zeros_like(q, dtype=torch.float32), None
        for source, k_now, v_now in _round(k, v, axis):
            rows, columns, causal = _parts(q.shape[2], axis.rank, source)
            part, part_lse = _forward(
                q[:, :, rows], k_now[:, :, columns], v_now[:, :, columns], causal
            )
            if lse is None:  # the own chunk, in which every row sees itself
                out, lse = part.float(), part_lse.clone()
                continue
            merged = torch.logaddexp(lse[:, :, rows], part_lse)
            out[:, :, rows] *= (lse[:, :, rows] - merged).exp()[..., None]
            out[:, :, rows] += part * (part_lse - merged).exp()[..., None]
            lse[:, :, rows] = merged
        out = out.to(q.dtype)
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
                behind = [torch.zeros_like(x, dtype=torch.float32) for x in (k, v)]
            rows, columns, causal = _parts(q.shape[2], axis.rank, source)
            parts = _backward(
                grad[:, :, rows], q[:, :, rows], k_now[:, :, columns], v_now[:, :, columns],
                out[:, :, rows], lse[:, :, rows], causal,
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


def _forward(q, k, v, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp [b, h, s]."""
    if q.is_cuda:
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _backward(grad, q, k, v, out, lse, causal: bool):
    """Gradients of q, k and v, from the output and log-sum-exp over all columns."""
    lse = lse.contiguous()
    if not q.is_cuda:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal
        )
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is not
    return _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed
    )
