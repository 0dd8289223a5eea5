"""The public relation operations: choice of back end and the autograd function."""

from dataclasses import replace

import torch
from torch import Tensor

from .mask import IntervalMask
from .operands import Operands, check_operands
from .statistics import Partials, RelationStatistics, finish
from .torch_reference import torch_backward, torch_partials

try:
    from .hopper import support as hopper
    from .triton import backward, forward
    from .triton import tiles as tiling
except ImportError:  # CPU-only platforms have no Triton; plain torch serves them
    backward = forward = hopper = tiling = None


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
    """KL(P_t || P_s) of every row of a relation: [b, Ha, n] fp32, in nats.

    S = scale_s A_s B_s^T and T = scale_t A_t B_t^T over the pairs the mask allows, P = softmax of a
    row, KL_i = sum_j P_t_ij (log P_t_ij - log P_s_ij) (LinearARD, arXiv 2604.00004), in one sweep
    with an online softmax (FlashAttention, arXiv 2205.14135). Rows that see nothing give 0.

    rows_s, rows_t: A, [b, Ha, n, d_s] and [b, Ha, n, d_t], fp32, bf16 or fp16, any strides.
    cols_s, cols_t: B, [b, Hb, m, d_s] and [b, Hb, m, d_t]; Ha a multiple of Hb, row head h pairs
        with column head h // (Ha / Hb). Both None: the self relation, B = A.
    mask: intervals for (b, n, m). scale_*: positive, default head_dim ** -0.5 of each side.
    backend: "triton", "torch", or None for Triton on CUDA tensors and torch elsewhere.

    Differentiable in the student's operands; the teacher is a constant. Vectors must be finite,
    also where the mask hides them. Raises ValueError for arguments that don't fit together.
    """
    return _RelationKL.apply(rows_s, rows_t, cols_s, cols_t, mask, scale_s, scale_t, backend)


def describe_kernels(device: torch.device) -> str:
    """Which kernels the relation takes on a device, to tell the user."""
    if device.type != "cuda" or hopper is None:
        return "plain torch"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "Triton"
    if hopper.AVAILABLE:
        return "Hopper's"
    return f"Triton; Hopper's, which are faster, are not used: {hopper.REASON}"


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
    """(lse_s, lse_t, kl), each [b, Ha, n] fp32, without autograd; arguments as `relation_kl`."""
    op = check_operands(rows_s, rows_t, cols_s, cols_t, mask, scale_s, scale_t)
    if use_triton(op, backend):
        return _triton_forward(op, partial=False)
    return finish(torch_partials(op))


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
    """The mergeable sums over the given columns only; arguments as `relation_kl`."""
    op = check_operands(rows_s, rows_t, cols_s, cols_t, mask, scale_s, scale_t)
    if use_triton(op, backend):
        return _triton_forward(op, partial=True)
    return torch_partials(op)


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
    """Gradient of sum_i row_weight_i KL_i: rows' for the self relation, else (rows', columns').

    With D_ij = w_i (P_s_ij - P_t_ij): scale_s D B_s for the rows, scale_s D^T A_s for the columns,
    their sum for the self relation. Deterministic.

    lse_s, lse_t: [b, Ha, n] of the *whole* rows, also when the given columns are only a part.
    row_weight: [b, Ha, n] or broadcastable to it, any strides; None = 1.
    out_dtype: dtype of the gradients; default the student's. fp32 to sum them over ranks.
    Other arguments and errors as `relation_kl`.
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
    if use_triton(op, backend):
        op = _unit_stride(op)
        run = hopper.hopper_backward if hopper.serves_backward(op) else backward.triton_backward
        grads = run(op, lse_s, lse_t, row_weight, out_dtype)
    else:
        grads = torch_backward(op, lse_s, lse_t, row_weight)
    grads = tuple(None if grad is None else grad.to(out_dtype) for grad in grads)
    return grads[0] if op.is_self else grads


def use_triton(op: Operands, backend: str | None) -> bool:
    """Whether Triton serves these operands; ValueError if it is asked for and cannot."""
    cuda, double = op.rows_s.is_cuda, op.accumulate_dtype == torch.float64
    if backend is None:
        return cuda and not double and forward is not None
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend must be 'triton', 'torch' or None, not {backend!r}")
    if backend == "triton":
        if forward is None:
            raise ValueError("backend 'triton' needs the triton package")
        if double:
            raise ValueError("backend 'triton' has no float64; use backend 'torch'")
        if not cuda and not tiling.INTERPRETED:
            raise ValueError("backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 set early")
    return backend == "triton"


def _triton_forward(op: Operands, partial: bool) -> RelationStatistics | Partials:
    """The fastest kernel that serves the operands."""
    op = _unit_stride(op)
    if hopper.serves(op):
        return hopper.hopper_forward(op, partial)
    return forward.triton_forward(op, partial)


def _unit_stride(op: Operands) -> Operands:
    """Copy only those operands whose last dimension is strided; the kernels take the rest as is."""
    named = {name: getattr(op, name) for name in ("rows_s", "rows_t", "cols_s", "cols_t")}
    if all(x.stride(3) == 1 for x in named.values()):
        return op
    return replace(op, **{k: x if x.stride(3) == 1 else x.contiguous() for k, x in named.items()})


class _RelationKL(torch.autograd.Function):
    """kl = relation_forward(...).kl; backward is `relation_backward` with the upstream gradient."""

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
