"""Fused Triton forward of the relation KL: one sweep over the column tiles of a block of rows."""

import torch
import triton
import triton.language as tl

from ..operands import Operands
from ..statistics import Partials, RelationStatistics
from . import tiles as tiling
from .tiles import LN2, load_intervals, load_vectors, own_block, tile_range


@triton.jit
def _sweep_tile(
    m_s,
    l_s,
    m_t,
    l_t,
    a,
    x_s,
    x_t,
    cols_s,
    cols_t,
    start,
    stride_s,
    stride_t,
    m,
    lo,
    hi,
    scale_s,
    scale_t,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    PADDED_S: tl.constexpr,
    PADDED_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Add one column tile to the running sums.

    m_s, m_t are maxima of the unscaled products (scales are positive); ``a`` is in units of log2:
    sum 2^v_t (v_t - v_s) over v = scale log2(e) x.y - its maximum, plus the gap of the maxima.
    """
    y_s = load_vectors(cols_s, start, stride_s, m, D_S, PADDED_S, BLOCK_N, MASKED, WIDEN)
    y_t = load_vectors(cols_t, start, stride_t, m, D_T, PADDED_T, BLOCK_N, MASKED, WIDEN)
    s = tl.dot(x_s, tl.trans(y_s), input_precision="ieee")
    t = tl.dot(x_t, tl.trans(y_t), input_precision="ieee")
    if MASKED:
        j = start + tl.arange(0, BLOCK_N)[None, :]
        allowed = (j >= lo[:, None]) & (j < hi[:, None])
        s = tl.where(allowed, s, float("-inf"))
        t = tl.where(allowed, t, float("-inf"))
    top_s = tl.maximum(m_s, tl.max(s, 1))
    top_t = tl.maximum(m_t, tl.max(t, 1))
    base_s = top_s
    base_t = top_t
    if MASKED:  # a row that has seen nothing yet would give -inf - -inf
        base_s = tl.where(top_s == float("-inf"), 0.0, top_s)
        base_t = tl.where(top_t == float("-inf"), 0.0, top_t)
    shift_s = base_s * scale_s
    shift_t = base_t * scale_t
    v_s = s * scale_s - shift_s[:, None]
    v_t = t * scale_t - shift_t[:, None]
    gap = v_t - v_s
    if MASKED:
        gap = tl.where(allowed, gap, 0.0)
    p_s = tl.exp2(v_s)
    p_t = tl.exp2(v_t)
    sum_t = tl.sum(p_t, 1)
    shrink_s = tl.exp2((m_s - base_s) * scale_s)
    shrink_t = tl.exp2((m_t - base_t) * scale_t)
    l_s = l_s * shrink_s + tl.sum(p_s, 1)
    l_t = l_t * shrink_t + sum_t
    a = a * shrink_t + (tl.sum(p_t * gap, 1) + sum_t * (shift_t - shift_s))
    return top_s, l_s, top_t, l_t, a


@triton.jit(do_not_specialize=["b", "heads", "n", "m", "section"])
def _forward_kernel(
    rows_s,
    rows_t,
    cols_s,
    cols_t,
    col_lo,
    col_hi,
    out,
    rows_s_b,
    rows_s_h,
    rows_s_n,
    rows_t_b,
    rows_t_h,
    rows_t_n,
    cols_s_b,
    cols_s_h,
    cols_s_n,
    cols_t_b,
    cols_t_h,
    cols_t_n,
    b,
    heads,
    group,
    n,
    m,
    section,
    scale_s,
    scale_t,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    PADDED_S: tl.constexpr,
    PADDED_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One block of rows of one head. ``scale_*`` carry log2(e); ``out`` is [5 or 3, b, heads, n].

    PARTIAL writes (m_s, l_s, m_t, l_t, a), otherwise (lse_s, lse_t, kl).
    """
    block, bh = own_block(tl.cdiv(n, BLOCK_M), b * heads, section, HEAVY_LAST=True)
    ib = tl.cast(bh // heads, tl.int64)
    ih = tl.cast(bh % heads, tl.int64)
    start_m = block * BLOCK_M
    i = start_m + tl.arange(0, BLOCK_M)
    inside = i < n
    lo, hi = load_intervals(col_lo + ib * n, col_hi + ib * n, i, n)
    first, last, full_first, full_last = tile_range(lo, hi, inside, BLOCK_N)

    rows_s += ib * rows_s_b + ih * rows_s_h
    rows_t += ib * rows_t_b + ih * rows_t_h
    cols_s += ib * cols_s_b + ih // group * cols_s_h
    cols_t += ib * cols_t_b + ih // group * cols_t_h
    x_s = load_vectors(rows_s, start_m, rows_s_n, n, D_S, PADDED_S, BLOCK_M, True, WIDEN)
    x_t = load_vectors(rows_t, start_m, rows_t_n, n, D_T, PADDED_T, BLOCK_M, True, WIDEN)

    m_s = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m_t = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_s = tl.zeros([BLOCK_M], tl.float32)
    l_t = tl.zeros([BLOCK_M], tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(full_first, full_last):
        m_s, l_s, m_t, l_t, a = _sweep_tile(
            m_s, l_s, m_t, l_t, a, x_s, x_t, cols_s, cols_t, tile * BLOCK_N, cols_s_n, cols_t_n,
            m, lo, hi, scale_s, scale_t, D_S, D_T, PADDED_S, PADDED_T, BLOCK_N, False, WIDEN,
        )  # fmt: skip
    # The tiles before and after the full ones, in one loop: the sums don't mind the order.
    for tile in range(first, last - (full_last - full_first)):
        start = tl.where(tile < full_first, tile, tile + (full_last - full_first)) * BLOCK_N
        m_s, l_s, m_t, l_t, a = _sweep_tile(
            m_s, l_s, m_t, l_t, a, x_s, x_t, cols_s, cols_t, start, cols_s_n, cols_t_n,
            m, lo, hi, scale_s, scale_t, D_S, D_T, PADDED_S, PADDED_T, BLOCK_N, True, WIDEN,
        )  # fmt: skip

    plane = tl.cast(b * heads, tl.int64) * n
    out += tl.cast(bh, tl.int64) * n + i
    live = lo < hi
    if PARTIAL:
        tl.store(out, m_s * (scale_s * LN2), mask=inside)
        tl.store(out + plane, l_s, mask=inside)
        tl.store(out + 2 * plane, m_t * (scale_t * LN2), mask=inside)
        tl.store(out + 3 * plane, l_t, mask=inside)
        tl.store(out + 4 * plane, a * LN2, mask=inside)
    else:
        lse_s = m_s * scale_s + tl.log2(l_s)
        lse_t = m_t * scale_t + tl.log2(l_t)
        kl = tl.where(live, a / l_t + (lse_s - lse_t), 0.0)
        tl.store(out, tl.where(live, lse_s * LN2, float("-inf")), mask=inside)
        tl.store(out + plane, tl.where(live, lse_t * LN2, float("-inf")), mask=inside)
        tl.store(out + 2 * plane, kl * LN2, mask=inside)


def triton_forward(op: Operands, partial: bool) -> RelationStatistics | Partials:
    """Launch the forward kernel; every tensor of the result is [b, Ha, n] fp32."""
    b, heads, n, d_s = op.rows_s.shape
    m, d_t = op.cols_t.shape[2:]
    operands = (op.rows_s, op.rows_t, op.cols_s, op.cols_t)
    block_m, block_n, warps, stages = tiling.choose_tiles(tiling.FORWARD_TILES, *operands)
    planes = 5 if partial else 3
    out = torch.empty(planes, b, heads, n, dtype=torch.float32, device=op.rows_s.device)
    with torch.cuda.device_of(op.rows_s):
        _forward_kernel[(triton.cdiv(n, block_m) * b * heads,)](
            *operands,
            op.mask.col_lo_bn.contiguous(),
            op.mask.col_hi_bn.contiguous(),
            out,
            *(stride for x in operands for stride in x.stride()[:3]),
            b,
            heads,
            op.group,
            n,
            m,
            tiling.section_heads(b * heads, op.cols_s, op.cols_t),
            op.scale_s * tiling.LOG2E.value,
            op.scale_t * tiling.LOG2E.value,
            D_S=d_s,
            D_T=d_t,
            PADDED_S=tiling.padded_dim(d_s),
            PADDED_T=tiling.padded_dim(d_t),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            PARTIAL=partial,
            WIDEN=tiling.INTERPRETED,
            num_warps=warps,
            num_stages=stages,
        )
    return Partials(*out) if partial else RelationStatistics(*out)
