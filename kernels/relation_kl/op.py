"""The public relation operations: argument checks, choice of back end, autograd.

S = scale_s A_s B_s^T and T = scale_t A_t B_t^T are the scores of the student and of the teacher
over the pairs that the mask allows, P is the softmax of a row, and each row i has

    KL_i = KL(P_t || P_s)_i = sum_j P_t_ij (log P_t_ij - log P_s_ij)

in nats (LinearARD, arXiv 2604.00004). One sweep with an online softmax computes it (FlashAttention,
arXiv 2205.14135). A row that sees no column has KL_i = 0.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .backends import choose
from .mask import IntervalMask
from .operands import check_operands
from .statistics import Partials, RelationStatistics


def relation_kl(
    rows_s: Tensor,
    rows_t: Tensor,
    cols_s: Tensor | None = None,
    cols_t: Tensor | None = None,
    *,
    mask: IntervalMask,
    scale_s: float | None = None,
    scale_t: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return KL(P_t || P_s) of every row of a relation, differentiable in the student's operands.

    The teacher is a constant. Vectors must be finite, also where the mask hides them.

    Args:
        rows_s, rows_t: A of student and teacher, [b, Ha, n, d_s] and [b, Ha, n, d_t], fp32, bf16,
            fp16 or (plain torch only) fp64, any strides.
        cols_s, cols_t: B of student and teacher, [b, Hb, m, d_s] and [b, Hb, m, d_t]. Ha is a
            multiple of Hb; row head h meets column head h // (Ha / Hb). Both None: the self
            relation, B = A.
        mask: Which pairs are allowed, for (b, n, m).
        scale_s, scale_t: Positive factors of the scores; by default head_dim^(-1/2) of each side.
        backend: "triton" (Hopper's or Triton's kernels), "torch", or None for the fastest back end
            that serves the call: a kernel on CUDA tensors, plain torch otherwise.

    Returns:
        [b, Ha, n] fp32, nats.

    Raises:
        ValueError: The arguments do not fit together, or the back end does not serve them.
    """
    return _RelationKL.apply(rows_s, rows_t, cols_s, cols_t, mask, scale_s, scale_t, backend)


@torch.no_grad()
def relation_forward(
    rows_s: Tensor,
    rows_t: Tensor,
    cols_s: Tensor | None = None,
    cols_t: Tensor | None = None,
    *,
    mask: IntervalMask,
    scale_s: float | None = None,
    scale_t: float | None = None,
    backend: str | None = None,
) -> RelationStatistics:
    """Return (lse_s, lse_t, kl) of every row, each [b, Ha, n] fp32 in nats, without autograd.

    The arguments and errors are the same as in ``relation_kl``.
    """
    op = check_operands(rows_s, rows_t, cols_s, cols_t, mask, scale_s, scale_t)
    statistics = choose(op, backend, backward=False).forward(op, partial=False)
    return cast(RelationStatistics, statistics)


@torch.no_grad()
def relation_partials(
    rows_s: Tensor,
    rows_t: Tensor,
    cols_s: Tensor | None = None,
    cols_t: Tensor | None = None,
    *,
    mask: IntervalMask,
    scale_s: float | None = None,
    scale_t: float | None = None,
    backend: str | None = None,
) -> Partials:
    """Return the mergeable sums of every row over the given columns only, without autograd.

    The arguments and errors are the same as in ``relation_kl``.
    """
    op = check_operands(rows_s, rows_t, cols_s, cols_t, mask, scale_s, scale_t)
    return cast(Partials, choose(op, backend, backward=False).forward(op, partial=True))


@torch.no_grad()
def relation_backward(
    rows_s: Tensor,
    rows_t: Tensor,
    cols_s: Tensor | None,
    cols_t: Tensor | None,
    lse_s: Tensor,
    lse_t: Tensor,
    row_weight: Tensor | None = None,
    *,
    mask: IntervalMask,
    scale_s: float | None = None,
    scale_t: float | None = None,
    backend: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the gradient of sum_i w_i KL_i with respect to the student's operands.

    With D_ij = w_i (P_s_ij - P_t_ij) it is scale_s D B_s for the rows and scale_s D^T A_s for the
    columns; a self relation gets their sum. Two calls with the same arguments give the same bits.

    Arguments and errors that are not listed here are the same as in ``relation_kl``.

    Args:
        lse_s, lse_t: Log-sum-exps of the *complete* rows, [b, Ha, n] in nats, even if the given
            columns are only some of the rows' columns.
        row_weight: w, [b, Ha, n] or broadcastable to it, any strides; None means 1.
        out_dtype: dtype of the gradients, by default the student's. Use fp32 for gradients that
            are summed over ranks.

    Returns:
        The gradient of ``rows_s`` for a self relation, and the pair of the gradients of ``rows_s``
        and ``cols_s`` otherwise; each has its operand's shape and ``out_dtype``.
    """
    op = check_operands(rows_s, rows_t, cols_s, cols_t, mask, scale_s, scale_t)
    shape = rows_s.shape[:3]
    if lse_s.shape != shape or lse_t.shape != shape:
        raise ValueError(
            f"lse_s {list(lse_s.shape)} and lse_t {list(lse_t.shape)} must be {list(shape)}"
        )
    given = [lse_s, lse_t] + ([] if row_weight is None else [row_weight])
    if any(x.device != rows_s.device for x in given):
        raise ValueError(f"lse_s, lse_t and row_weight must be on {rows_s.device}")
    lse_s, lse_t = (x.to(op.accumulate_dtype) for x in (lse_s, lse_t))
    if row_weight is not None:
        try:
            row_weight = row_weight.to(op.accumulate_dtype).expand(shape)
        except RuntimeError:
            raise ValueError(
                f"row_weight {list(row_weight.shape)} must broadcast to {list(shape)}"
            ) from None
    out_dtype = out_dtype or rows_s.dtype
    chosen = choose(op, backend, backward=True)
    of_rows, of_columns = chosen.backward(op, lse_s, lse_t, row_weight, out_dtype)
    of_rows = of_rows.to(out_dtype)
    return of_rows if of_columns is None else (of_rows, of_columns.to(out_dtype))


class _RelationKL(torch.autograd.Function):
    """``relation_forward(...).kl``, with ``relation_backward`` as its backward pass."""

    @staticmethod
    def forward(ctx, rows_s, rows_t, cols_s, cols_t, mask, scale_s, scale_t, backend):
        options = dict(mask=mask, scale_s=scale_s, scale_t=scale_t, backend=backend)
        lse_s, lse_t, kl = relation_forward(rows_s, rows_t, cols_s, cols_t, **options)
        ctx.save_for_backward(rows_s, rows_t, cols_s, cols_t, lse_s, lse_t)
        ctx.options = options
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_kl):
        grads = relation_backward(*ctx.saved_tensors, grad_kl, **ctx.options)
        grad_rows, grad_cols = (grads, None) if torch.is_tensor(grads) else grads
        return grad_rows, None, grad_cols, None, None, None, None, None
