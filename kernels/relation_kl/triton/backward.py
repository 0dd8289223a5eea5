"""Triton backward of the relation KL: every gradient row is one accumulation, without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Operands
from . import tiles as tiling
from .tiles import LOG2E, load_intervals, load_vectors, own_block, tile_range

# fp16 rounds anything under 6e-8 to zero, so there D is scaled up before it meets the tensor
# cores: with |w| <= 1 the two roles together stay below 2 * 2**14 < 65504.
FP16_LOG2_GAIN = 14


@triton.jit
def _difference(s, t, lse_s, lse_t, weight, allowed, WEIGHTED: tl.constexpr, MASKED: tl.constexpr):
    """D = weight (P_s - P_t) where allowed, from scores and log-sum-exps in units of log2."""
    delta = tl.exp2(s - lse_s) - tl.exp2(t - lse_t)
    if WEIGHTED:
        delta = delta * weight
    if MASKED:
        delta = tl.where(allowed, delta, 0.0)
    return delta


@triton.jit
def _load_rows(base, i, count, BOUNDED: tl.constexpr):
    """One fp32 number per row i; 0 past ``count`` if BOUNDED."""
    return tl.load(base + i, mask=i < count, other=0.0) if BOUNDED else tl.load(base + i)


@triton.jit
def _add_tile(
    acc,
    start,
    x_s,
    x_t,
    y_s,
    y_t,
    y_s_n,
    y_t_n,
    count,
    own_lse_s,
    own_lse_t,
    own_weight,
    lse_s,
    lse_t,
    weight,
    col_lo,
    col_hi,
    row_lo,
    row_hi,
    scale_s,
    scale_t,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    PADDED_S: tl.constexpr,
    PADDED_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AS_ROWS: tl.constexpr,
    AS_COLS: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LOG2_GAIN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """acc += (D_row + D_col) Y over one tile of other vectors; both roles share the products."""
    tile_s = load_vectors(y_s, start, y_s_n, count, D_S, PADDED_S, BLOCK_N, MASKED, WIDEN)
    tile_t = load_vectors(y_t, start, y_t_n, count, D_T, PADDED_T, BLOCK_N, MASKED, WIDEN)
    s = tl.dot(x_s, tl.trans(tile_s), input_precision="ieee") * scale_s
    t = tl.dot(x_t, tl.trans(tile_t), input_precision="ieee") * scale_t
    other = start + tl.arange(0, BLOCK_N)
    if AS_ROWS:
        seen = (other[None, :] >= col_lo[:, None]) & (other[None, :] < col_hi[:, None])
        delta = _difference(
            s, t, own_lse_s[:, None], own_lse_t[:, None], own_weight[:, None], seen,
            WEIGHTED, MASKED,
        )  # fmt: skip
    if AS_COLS:
        its_lse_s = _load_rows(lse_s, other, count, MASKED) * LOG2E - LOG2_GAIN
        its_lse_t = _load_rows(lse_t, other, count, MASKED) * LOG2E - LOG2_GAIN
        its_weight = _load_rows(weight, other, count, MASKED) if WEIGHTED else its_lse_s
        seeing = (other[None, :] >= row_lo[:, None]) & (other[None, :] < row_hi[:, None])
        transposed = _difference(
            s, t, its_lse_s[None, :], its_lse_t[None, :], its_weight[None, :], seeing,
            WEIGHTED, MASKED,
        )  # fmt: skip
        delta = delta + transposed if AS_ROWS else transposed
    return tl.dot(delta.to(tile_s.dtype), tile_s, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["b", "own_heads", "n", "m", "section"])
def _backward_kernel(
    x_s,
    x_t,
    y_s,
    y_t,
    lse_s,
    lse_t,
    weight,
    unit,
    col_lo,
    col_hi,
    row_lo,
    row_hi,
    grad,
    x_s_b,
    x_s_h,
    x_s_n,
    x_t_b,
    x_t_h,
    x_t_n,
    y_s_b,
    y_s_h,
    y_s_n,
    y_t_b,
    y_t_h,
    y_t_n,
    grad_b,
    grad_h,
    grad_n,
    b,
    own_heads,
    group,
    n,
    m,
    section,
    scale_s,
    scale_t,
    grad_scale,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    PADDED_S: tl.constexpr,
    PADDED_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_ROLE: tl.constexpr,
    COL_ROLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    LOG2_GAIN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Gradient of one block of own vectors x (n of them) against the other vectors y (m).

    ROW_ROLE: own vectors are rows i, D_ij with their own lse, over the columns j they see.
    COL_ROLE: own vectors are columns j, D_ij with the others' lse, over the rows i that see them.
    Self relation: both, in one accumulator, and a tile where both apply is multiplied once.
    ``scale_*`` carry log2(e). lse and weight belong to the rows, whichever side those are.
    """
    block, bh = own_block(tl.cdiv(n, BLOCK_M), b * own_heads, section, HEAVY_LAST=ROW_ROLE)
    ib = tl.cast(bh // own_heads, tl.int64)
    ih = tl.cast(bh % own_heads, tl.int64)
    start_m = block * BLOCK_M
    own = start_m + tl.arange(0, BLOCK_M)
    inside = own < n

    x_s += ib * x_s_b + ih * x_s_h
    x_t += ib * x_t_b + ih * x_t_h
    own_s = load_vectors(x_s, start_m, x_s_n, n, D_S, PADDED_S, BLOCK_M, True, WIDEN)
    own_t = load_vectors(x_t, start_m, x_t_n, n, D_T, PADDED_T, BLOCK_M, True, WIDEN)

    # Tiles that are whole in one role and absent in the other take the short loops. The rest,
    # from the first tile of either role to the last, is masked and serves both roles at once.
    NOTHING: tl.constexpr = 2147483647
    col_first, col_last, col_full, col_full_end = NOTHING, 0, NOTHING, 0
    row_first, row_last, row_full, row_full_end = NOTHING, 0, NOTHING, 0
    seen_lo, seen_hi, seeing_lo, seeing_hi = own, own, own, own
    own_lse_s = tl.zeros([BLOCK_M], tl.float32)
    own_lse_t = tl.zeros([BLOCK_M], tl.float32)
    own_weight = tl.zeros([BLOCK_M], tl.float32)
    if ROW_ROLE:
        seen_lo, seen_hi = load_intervals(col_lo + ib * n, col_hi + ib * n, own, n)
        col_first, col_last, col_full, col_full_end = tile_range(seen_lo, seen_hi, inside, BLOCK_N)
        stats = tl.cast(bh, tl.int64) * n + own
        own_lse_s = tl.load(lse_s + stats, mask=inside, other=0.0) * LOG2E - LOG2_GAIN
        own_lse_t = tl.load(lse_t + stats, mask=inside, other=0.0) * LOG2E - LOG2_GAIN
        if WEIGHTED:
            own_weight = tl.load(weight + stats, mask=inside, other=0.0)
    if COL_ROLE:
        seeing_lo, seeing_hi = load_intervals(row_lo + ib * n, row_hi + ib * n, own, n)
        row_first, row_last, row_full, row_full_end = tile_range(
            seeing_lo, seeing_hi, inside, BLOCK_N
        )
    if ROW_ROLE and COL_ROLE:
        col_full_end = tl.minimum(col_full_end, row_first)
        row_full = tl.maximum(row_full, col_last)
    first = tl.minimum(col_first, row_first)
    last = tl.maximum(col_last, row_last)
    col_whole = tl.maximum(col_full_end - col_full, 0) if ROW_ROLE else 0
    row_whole = tl.maximum(row_full_end - row_full, 0) if COL_ROLE else 0

    acc = tl.zeros([BLOCK_M, PADDED_S], tl.float32)
    # Own columns of grouped heads are seen by `group` row heads; own rows see one column head.
    passes = group if COL_ROLE else 1
    for step in range(passes):
        other_head = ih * group + step if COL_ROLE else ih // group
        tile_s = y_s + ib * y_s_b + other_head * y_s_h
        tile_t = y_t + ib * y_t_b + other_head * y_t_h
        their_stats = (ib * own_heads * passes + other_head) * m
        their_lse_s, their_lse_t, their_weight = (
            lse_s + their_stats, lse_t + their_stats, weight + their_stats,
        )  # fmt: skip
        if ROW_ROLE:
            for tile in range(col_full, col_full + col_whole):
                acc = _add_tile(
                    acc, tile * BLOCK_N, own_s, own_t, tile_s, tile_t, y_s_n, y_t_n, m,
                    own_lse_s, own_lse_t, own_weight, their_lse_s, their_lse_t, their_weight,
                    seen_lo, seen_hi, seeing_lo, seeing_hi, scale_s, scale_t,
                    D_S, D_T, PADDED_S, PADDED_T, BLOCK_N, True, False, False,
                    WEIGHTED, LOG2_GAIN, WIDEN,
                )  # fmt: skip
        if COL_ROLE:
            for tile in range(row_full, row_full + row_whole):
                acc = _add_tile(
                    acc, tile * BLOCK_N, own_s, own_t, tile_s, tile_t, y_s_n, y_t_n, m,
                    own_lse_s, own_lse_t, own_weight, their_lse_s, their_lse_t, their_weight,
                    seen_lo, seen_hi, seeing_lo, seeing_hi, scale_s, scale_t,
                    D_S, D_T, PADDED_S, PADDED_T, BLOCK_N, False, True, False,
                    WEIGHTED, LOG2_GAIN, WIDEN,
                )  # fmt: skip
        for edge in range(first, last - col_whole - row_whole):
            tile = edge
            if ROW_ROLE:
                tile = tl.where(tile < col_full, tile, tile + col_whole)
            if COL_ROLE:
                tile = tl.where(tile < row_full, tile, tile + row_whole)
            acc = _add_tile(
                acc, tile * BLOCK_N, own_s, own_t, tile_s, tile_t, y_s_n, y_t_n, m,
                own_lse_s, own_lse_t, own_weight, their_lse_s, their_lse_t, their_weight,
                seen_lo, seen_hi, seeing_lo, seeing_hi, scale_s, scale_t,
                D_S, D_T, PADDED_S, PADDED_T, BLOCK_N, ROW_ROLE, COL_ROLE, True,
                WEIGHTED, LOG2_GAIN, WIDEN,
            )  # fmt: skip

    acc = acc * grad_scale
    if HAS_UNIT:
        acc = acc * tl.load(unit)
    grad += ib * grad_b + ih * grad_h + tl.cast(start_m, tl.int64) * grad_n
    i = tl.arange(0, BLOCK_M)[:, None]
    c = tl.arange(0, PADDED_S)[None, :]
    tl.store(
        grad + (i * grad_n + c),
        acc.to(grad.dtype.element_ty),
        mask=(start_m + i < n) & (c < D_S),
    )


def triton_backward(
    op: Operands, lse_s: Tensor, lse_t: Tensor, row_weight: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Gradients of sum_i w_i KL_i: (rows, columns or None if self).

    In ``out_dtype``, or fp32 under the interpreter.
    """
    weight, unit = split_weight(row_weight, op.rows_s.dtype)
    stats = (lse_s.contiguous(), lse_t.contiguous(), weight, unit)
    rows, cols = (op.rows_s, op.rows_t), (op.cols_s, op.cols_t)
    if op.is_self:
        return _launch(op, rows, rows, stats, out_dtype, row_role=True, col_role=True), None
    return (
        _launch(op, rows, cols, stats, out_dtype, row_role=True, col_role=False),
        _launch(op, cols, rows, stats, out_dtype, row_role=False, col_role=True),
    )


def split_weight(
    row_weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(per-row weights or None for 1, a one-element factor of the whole gradient or None for 1).

    A weight that is one expanded number (the gradient of a sum or mean) costs nothing per tile.
    For fp16 the per-row weights are normalized to |w| <= 1, see FP16_LOG2_GAIN.
    """
    if row_weight is None:
        return None, None
    if not any(row_weight.stride()):
        return None, row_weight
    if dtype != torch.float16:
        return row_weight.contiguous(), None
    peak = row_weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return (row_weight / peak).contiguous(), peak


def _launch(
    op: Operands,
    own: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    stats: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    out_dtype: torch.dtype,
    *,
    row_role: bool,
    col_role: bool,
) -> Tensor:
    lse_s, lse_t, weight, unit = stats
    b, heads, n, d_s = own[0].shape
    m, d_t = other[1].shape[2:]
    block_m, block_n, warps, stages = tiling.choose_tiles(tiling.BACKWARD_TILES, *own, *other)
    log2_gain = FP16_LOG2_GAIN if own[0].dtype == torch.float16 else 0
    # The interpreter truncates when it stores bf16; the caller rounds.
    grad = torch.empty_like(own[0], dtype=torch.float32 if tiling.INTERPRETED else out_dtype)
    with torch.cuda.device_of(grad):
        _backward_kernel[(triton.cdiv(n, block_m) * b * heads,)](
            *own,
            *other,
            lse_s,
            lse_t,
            lse_s if weight is None else weight,
            lse_s if unit is None else unit,
            op.mask.col_lo_bn.contiguous(),
            op.mask.col_hi_bn.contiguous(),
            op.mask.row_lo_bm.contiguous(),
            op.mask.row_hi_bm.contiguous(),
            grad,
            *(stride for x in (*own, *other, grad) for stride in x.stride()[:3]),
            b,
            heads,
            op.group,
            n,
            m,
            tiling.section_heads(b * heads, *other),
            op.scale_s * tiling.LOG2E.value,
            op.scale_t * tiling.LOG2E.value,
            op.scale_s * 2.0**-log2_gain,
            D_S=d_s,
            D_T=d_t,
            PADDED_S=tiling.padded_dim(d_s),
            PADDED_T=tiling.padded_dim(d_t),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            ROW_ROLE=row_role,
            COL_ROLE=col_role,
            WEIGHTED=weight is not None,
            HAS_UNIT=unit is not None,
            LOG2_GAIN=log2_gain,
            WIDEN=tiling.INTERPRETED,
            num_warps=warps,
            num_stages=stages,
        )
    return grad
