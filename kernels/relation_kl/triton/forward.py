"""Fused Triton forward of the relation KL: one sweep over the columns per block of rows.

The sums and their meaning are in ``statistics``; the terms are in ``triton.tiles``. Inside the
sweep two conventions save work: the maxima ``m`` are maxima of the unscaled products (the scales
are positive, so the same column has the maximum), and ``a`` is in units of log2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..operands import Operands
from ..statistics import Partials, RelationStatistics
from . import tiles
from .tiles import (
    LN2,
    Pair,
    Vectors,
    block_of_program,
    load_intervals,
    load_vectors,
    strides_of,
    tile_span,
)


class RunningSums(NamedTuple):
    """The sums of the block's rows over the columns met so far, [BLOCK_M] fp32 each.

    With v = scale log2(e) x.y - (its maximum), for each side:

    Attributes:
        m_s, m_t: Maximum of the unscaled products x.y.
        l_s, l_t: sum_j 2^v.
        a: sum_j 2^v_t (T_ij - S_ij), T and S in units of log2.
    """

    m_s: tl.tensor
    l_s: tl.tensor
    m_t: tl.tensor
    l_t: tl.tensor
    a: tl.tensor


@triton.jit
def _add_tile(
    sums,
    block,
    cols,
    start,
    allowed,
    scale,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the ``RunningSums`` with the columns [start, start + BLOCK_N) added.

    Args:
        sums: The ``RunningSums`` so far.
        block: ``Pair`` of the block's rows, [BLOCK_M, padded head_dim].
        cols: ``Pair`` of the ``Vectors`` of one column head.
        start: First column of the tile.
        allowed: ``Interval`` of the columns that each row sees.
        scale: ``Pair`` of factors of the products; they carry log2(e).
        MASKED: Whether the tile may hold pairs that are not allowed, or reach past the last column.
    """
    y_s = load_vectors(cols.s, start, D_S, BLOCK_N, MASKED)
    y_t = load_vectors(cols.t, start, D_T, BLOCK_N, MASKED)
    s = tl.dot(block.s, tl.trans(y_s), input_precision="ieee")
    t = tl.dot(block.t, tl.trans(y_t), input_precision="ieee")
    if MASKED:
        j = start + tl.arange(0, BLOCK_N)[None, :]
        pairs = (j >= allowed.lo[:, None]) & (j < allowed.hi[:, None])
        s = tl.where(pairs, s, float("-inf"))
        t = tl.where(pairs, t, float("-inf"))
    m_s = tl.maximum(sums.m_s, tl.max(s, 1))
    m_t = tl.maximum(sums.m_t, tl.max(t, 1))
    base_s = m_s
    base_t = m_t
    if MASKED:  # -inf - -inf would be NaN in a row that has not seen any column yet
        base_s = tl.where(m_s == float("-inf"), 0.0, m_s)
        base_t = tl.where(m_t == float("-inf"), 0.0, m_t)
    shift_s = base_s * scale.s
    shift_t = base_t * scale.t
    v_s = s * scale.s - shift_s[:, None]
    v_t = t * scale.t - shift_t[:, None]
    gap = v_t - v_s
    if MASKED:
        gap = tl.where(pairs, gap, 0.0)
    p_s = tl.exp2(v_s)
    p_t = tl.exp2(v_t)
    sum_t = tl.sum(p_t, 1)
    shrink_s = tl.exp2((sums.m_s - base_s) * scale.s)
    shrink_t = tl.exp2((sums.m_t - base_t) * scale.t)
    l_s = sums.l_s * shrink_s + tl.sum(p_s, 1)
    l_t = sums.l_t * shrink_t + sum_t
    # T - S is the gap of v_t and v_s plus the gap of the two shifts.
    a = sums.a * shrink_t + (tl.sum(p_t * gap, 1) + sum_t * (shift_t - shift_s))
    return RunningSums(m_s, l_s, m_t, l_t, a)


@triton.jit(do_not_specialize=["b", "heads", "n", "m", "section"])
def _forward_kernel(
    rows,
    cols,
    visible,
    out,
    row_strides,
    col_strides,
    b,
    heads,
    group,
    n,
    m,
    section,
    scale,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Write the sums or statistics of BLOCK_M rows of one head.

    Args:
        rows: ``Pair`` of pointers to [b, heads, n, D_S] and [b, heads, n, D_T].
        cols: ``Pair`` of pointers to [b, heads / group, m, D_S] and [b, heads / group, m, D_T].
        visible: ``Interval`` of pointers to [b, n]: the columns that each row sees.
        out: [5, b, heads, n] fp32, m_s, l_s, m_t, l_t, a in nats, if PARTIAL; otherwise
            [3, b, heads, n] fp32, lse_s, lse_t, kl in nats.
        row_strides, col_strides: ``Pair`` of the ``Strides`` of ``rows`` and ``cols``.
        section: Number of (sequence, head) pairs in one section, see ``block_of_program``.
        scale: ``Pair`` of factors of the products; they carry log2(e).
    """
    block, bh = block_of_program(tl.cdiv(n, BLOCK_M), b * heads, section, HEAVY_LAST=True)
    ib = tl.cast(bh // heads, tl.int64)
    ih = tl.cast(bh % heads, tl.int64)
    block_start = block * BLOCK_M
    i = block_start + tl.arange(0, BLOCK_M)
    inside = i < n
    allowed = load_intervals(visible.lo + ib * n, visible.hi + ib * n, i, n)
    span = tile_span(allowed, inside, BLOCK_N)

    rows_s = rows.s + (ib * row_strides.s.batch + ih * row_strides.s.head)
    rows_t = rows.t + (ib * row_strides.t.batch + ih * row_strides.t.head)
    cols_s = cols.s + (ib * col_strides.s.batch + ih // group * col_strides.s.head)
    cols_t = cols.t + (ib * col_strides.t.batch + ih // group * col_strides.t.head)
    rows_s = Vectors(rows_s, row_strides.s.vector, n)
    rows_t = Vectors(rows_t, row_strides.t.vector, n)
    swept = Pair(
        Vectors(cols_s, col_strides.s.vector, m),
        Vectors(cols_t, col_strides.t.vector, m),
    )
    block_vectors = Pair(
        load_vectors(rows_s, block_start, D_S, BLOCK_M, True),
        load_vectors(rows_t, block_start, D_T, BLOCK_M, True),
    )

    m_s = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m_t = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_s = tl.zeros([BLOCK_M], tl.float32)
    l_t = tl.zeros([BLOCK_M], tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    sums = RunningSums(m_s, l_s, m_t, l_t, a)
    for tile in range(span.full_start, span.full_end):
        start = tile * BLOCK_N
        sums = _add_tile(
            sums, block_vectors, swept, start, allowed, scale, D_S, D_T, BLOCK_N, MASKED=False
        )
    # One loop visits the edge tiles before and after the full ones: their order does not matter.
    full = span.full_end - span.full_start
    for tile in range(span.start, span.end - full):
        start = tl.where(tile < span.full_start, tile, tile + full) * BLOCK_N
        sums = _add_tile(
            sums, block_vectors, swept, start, allowed, scale, D_S, D_T, BLOCK_N, MASKED=True
        )

    m_s, l_s, m_t, l_t, a = sums
    plane = tl.cast(b * heads, tl.int64) * n
    out += tl.cast(bh, tl.int64) * n + i
    nonempty = allowed.lo < allowed.hi
    if PARTIAL:
        tl.store(out, m_s * (scale.s * LN2), mask=inside)
        tl.store(out + plane, l_s, mask=inside)
        tl.store(out + 2 * plane, m_t * (scale.t * LN2), mask=inside)
        tl.store(out + 3 * plane, l_t, mask=inside)
        tl.store(out + 4 * plane, a * LN2, mask=inside)
    else:
        lse_s = m_s * scale.s + tl.log2(l_s)
        lse_t = m_t * scale.t + tl.log2(l_t)
        kl = tl.where(nonempty, a / l_t + (lse_s - lse_t), 0.0)
        tl.store(out, tl.where(nonempty, lse_s * LN2, float("-inf")), mask=inside)
        tl.store(out + plane, tl.where(nonempty, lse_t * LN2, float("-inf")), mask=inside)
        tl.store(out + 2 * plane, kl * LN2, mask=inside)


def triton_forward(op: Operands, partial: bool) -> RelationStatistics | Partials:
    """Run the forward kernel.

    Args:
        op: The operands; the last dimension of each is contiguous.
        partial: Whether to return ``Partials`` over the given columns instead of the statistics.

    Returns:
        Tensors [b, Ha, n] fp32.
    """
    b, heads, n, d_s = op.rows_s.shape
    m, d_t = op.cols_t.shape[2:]
    operands = (op.rows_s, op.rows_t, op.cols_s, op.cols_t)
    block_m, block_n, warps, stages = tiles.choose_tiles(tiles.FORWARD_TILES, *operands)
    planes = 5 if partial else 3
    out = torch.empty(planes, b, heads, n, dtype=torch.float32, device=op.rows_s.device)
    with torch.cuda.device_of(op.rows_s):
        _forward_kernel[(triton.cdiv(n, block_m) * b * heads,)](
            Pair(op.rows_s, op.rows_t),
            Pair(op.cols_s, op.cols_t),
            tiles.Interval(op.mask.col_lo_bn.contiguous(), op.mask.col_hi_bn.contiguous()),
            out,
            Pair(strides_of(op.rows_s), strides_of(op.rows_t)),
            Pair(strides_of(op.cols_s), strides_of(op.cols_t)),
            b,
            heads,
            op.group,
            n,
            m,
            tiles.section_heads(b * heads, op.cols_s, op.cols_t),
            Pair(op.scale_s * tiles.LOG2E.value, op.scale_t * tiles.LOG2E.value),
            D_S=d_s,
            D_T=d_t,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            PARTIAL=partial,
            num_warps=warps,
            num_stages=stages,
        )
    return Partials(*out) if partial else RelationStatistics(*out)
