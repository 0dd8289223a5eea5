"""Triton backward of the relation KL: every row of a gradient is one sum, without atomics.

With D_ij = w_i (P_s_ij - P_t_ij) over the allowed pairs (LinearARD, arXiv 2604.00004), the gradient
of sum_i w_i KL_i is scale_s D Y for the rows X and scale_s D^T X for the columns Y. A self relation
gets the sum of both, and D needs X X^T only, which is symmetric. So a program can compute the
entire gradient of its block of vectors x in one sweep over the other vectors y, in two roles:

* *row role*: x are rows i, y are the columns j that they see. The gradient is
  scale_s sum_j D_ij y_j, with the log-sum-exps of the rows x.
* *column role*: x are columns j, y are the rows i that see them. The gradient is
  scale_s sum_i D_ij y_i, with the log-sum-exps of the rows y.

In a self relation a block has both roles, and a tile that counts in both is multiplied once. The
other terms are in ``triton.tiles``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Operands
from . import tiles
from .tiles import (
    BEYOND,
    LOG2E,
    Interval,
    Pair,
    TileSpan,
    Vectors,
    block_of_program,
    load_intervals,
    load_vectors,
    padded_dim,
    strides_of,
    tile_span,
)

# fp16 rounds every number below 6e-8 to zero, so with fp16 operands D is scaled up before it goes
# to the tensor cores. With |w| <= 1 the two roles together stay below 2 * 2**14 < 65504.
FP16_LOG2_GAIN = 14


class RowStatistics(NamedTuple):
    """Log-sum-exps and weight of rows: pointers to fp32 (lse in nats), or loaded tensors.

    The loaded log-sum-exps are in units of log2 and reduced by LOG2_GAIN, so that 2^(S - lse) is P
    times 2^LOG2_GAIN.
    """

    lse_s: tl.tensor
    lse_t: tl.tensor
    weight: tl.tensor


@triton.jit
def _weighted_difference(s, t, stats, pairs, WEIGHTED: tl.constexpr, MASKED: tl.constexpr):
    """Return D = weight (P_s - P_t), and 0 where a pair is not allowed.

    Args:
        s, t: Scores in units of log2.
        stats: Loaded ``RowStatistics``, broadcastable to the scores.
        pairs: Which pairs are allowed; used if MASKED.
        WEIGHTED: Whether there is a weight other than 1.
    """
    delta = tl.exp2(s - stats.lse_s) - tl.exp2(t - stats.lse_t)
    if WEIGHTED:
        delta = delta * stats.weight
    if MASKED:
        delta = tl.where(pairs, delta, 0.0)
    return delta


@triton.jit
def _load_rows(base, i, length, BOUNDED: tl.constexpr):
    """Load one fp32 number for each row ``i``; 0 past ``length`` if BOUNDED."""
    return tl.load(base + i, mask=i < length, other=0.0) if BOUNDED else tl.load(base + i)


@triton.jit
def _add_tile(
    acc,
    block,
    swept,
    start,
    block_stats,
    swept_stats,
    visible,
    viewers,
    scale,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_ROLE: tl.constexpr,
    COL_ROLE: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LOG2_GAIN: tl.constexpr,
):
    """Return acc + D y over one tile of swept vectors; both roles share the products.

    Args:
        acc: The gradient of the block so far, [BLOCK_M, padded head_dim] fp32.
        block: ``Pair`` of the block's vectors, [BLOCK_M, padded head_dim].
        swept: ``Pair`` of the ``Vectors`` of one head that the block meets.
        start: First swept vector of the tile.
        block_stats: Loaded ``RowStatistics`` of the block, for the row role.
        swept_stats: Pointers to the ``RowStatistics`` of the swept head, for the column role.
        visible: ``Interval`` of the swept columns that each row of the block sees (row role).
        viewers: ``Interval`` of the swept rows that see each column of the block (column role).
        scale: ``Pair`` of factors of the products; they carry log2(e).
        ROW_ROLE, COL_ROLE: The roles in which the tile counts.
        MASKED: Whether the tile may hold pairs that are not allowed, or reach past the last vector.
    """
    y_s = load_vectors(swept.s, start, D_S, BLOCK_N, MASKED)
    y_t = load_vectors(swept.t, start, D_T, BLOCK_N, MASKED)
    s = tl.dot(block.s, tl.trans(y_s), input_precision="ieee") * scale.s
    t = tl.dot(block.t, tl.trans(y_t), input_precision="ieee") * scale.t
    j = start + tl.arange(0, BLOCK_N)
    if ROW_ROLE:
        pairs = (j[None, :] >= visible.lo[:, None]) & (j[None, :] < visible.hi[:, None])
        stats = RowStatistics(
            block_stats.lse_s[:, None], block_stats.lse_t[:, None], block_stats.weight[:, None]
        )
        delta = _weighted_difference(s, t, stats, pairs, WEIGHTED, MASKED)
    if COL_ROLE:
        lse_s = _load_rows(swept_stats.lse_s, j, swept.s.length, MASKED) * LOG2E - LOG2_GAIN
        lse_t = _load_rows(swept_stats.lse_t, j, swept.s.length, MASKED) * LOG2E - LOG2_GAIN
        weight = _load_rows(swept_stats.weight, j, swept.s.length, MASKED) if WEIGHTED else lse_s
        pairs = (j[None, :] >= viewers.lo[:, None]) & (j[None, :] < viewers.hi[:, None])
        stats = RowStatistics(lse_s[None, :], lse_t[None, :], weight[None, :])
        transposed = _weighted_difference(s, t, stats, pairs, WEIGHTED, MASKED)
        delta = delta + transposed if ROW_ROLE else transposed
    return tl.dot(delta.to(y_s.dtype), y_s, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["b", "heads", "n", "m", "section"])
def _backward_kernel(
    block,
    swept,
    stats,
    unit,
    cols_of_row,
    rows_of_col,
    grad,
    block_strides,
    swept_strides,
    grad_strides,
    b,
    heads,
    group,
    n,
    m,
    section,
    scale,
    grad_scale,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_ROLE: tl.constexpr,
    COL_ROLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    LOG2_GAIN: tl.constexpr,
):
    """Write the gradient of BLOCK_M vectors of one head.

    Args:
        block: ``Pair`` of pointers to [b, heads, n, D]: the operand that the gradient is for.
        swept: ``Pair`` of pointers to [b, heads', m, D]: the other operand, or the same one.
            heads' = heads / group for the row role alone, heads * group for the column role alone.
        stats: ``RowStatistics`` of pointers, [b, row heads, rows] fp32, contiguous, lse in nats.
            They belong to the rows, whether these are the block or the swept operand.
        unit: One fp32 number, a factor of the entire gradient, if HAS_UNIT.
        cols_of_row: ``Interval`` of pointers to [b, rows]: the columns that each row sees.
        rows_of_col: ``Interval`` of pointers to [b, columns]: the rows that see each column.
        grad: [b, heads, n, D_S].
        block_strides, swept_strides: ``Pair`` of ``Strides``. grad_strides: ``Strides``.
        group: Number of row heads per column head.
        section: Number of (sequence, head) pairs in one section, see ``block_of_program``.
        scale: ``Pair`` of factors of the products; they carry log2(e).
        grad_scale: scale_s / 2^LOG2_GAIN.
        WEIGHTED: Whether rows have weights other than 1.
        LOG2_GAIN: D is multiplied by 2^LOG2_GAIN before it is rounded to the operands' dtype.
    """
    blocks = tl.cdiv(n, BLOCK_M)
    block_index, bh = block_of_program(blocks, b * heads, section, HEAVY_LAST=ROW_ROLE)
    ib = tl.cast(bh // heads, tl.int64)
    ih = tl.cast(bh % heads, tl.int64)
    block_start = block_index * BLOCK_M
    i = block_start + tl.arange(0, BLOCK_M)
    inside = i < n

    block_s = block.s + (ib * block_strides.s.batch + ih * block_strides.s.head)
    block_t = block.t + (ib * block_strides.t.batch + ih * block_strides.t.head)
    block_s = Vectors(block_s, block_strides.s.vector, n)
    block_t = Vectors(block_t, block_strides.t.vector, n)
    x = Pair(
        load_vectors(block_s, block_start, D_S, BLOCK_M, True),
        load_vectors(block_t, block_start, D_T, BLOCK_M, True),
    )

    # A tile that is full in one role and does not count in the other takes a short loop. All other
    # tiles, from the first of either role to the last, are masked and count in both roles at once.
    row_span = TileSpan(BEYOND, BEYOND, 0, 0)
    col_span = TileSpan(BEYOND, BEYOND, 0, 0)
    visible = Interval(i, i)
    viewers = Interval(i, i)
    lse_s = tl.zeros([BLOCK_M], tl.float32)
    lse_t = tl.zeros([BLOCK_M], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    if ROW_ROLE:
        visible = load_intervals(cols_of_row.lo + ib * n, cols_of_row.hi + ib * n, i, n)
        row_span = tile_span(visible, inside, BLOCK_N)
        offsets = tl.cast(bh, tl.int64) * n + i
        lse_s = tl.load(stats.lse_s + offsets, mask=inside, other=0.0) * LOG2E - LOG2_GAIN
        lse_t = tl.load(stats.lse_t + offsets, mask=inside, other=0.0) * LOG2E - LOG2_GAIN
        if WEIGHTED:
            weight = tl.load(stats.weight + offsets, mask=inside, other=0.0)
    block_stats = RowStatistics(lse_s, lse_t, weight)
    if COL_ROLE:
        viewers = load_intervals(rows_of_col.lo + ib * n, rows_of_col.hi + ib * n, i, n)
        col_span = tile_span(viewers, inside, BLOCK_N)
    row_full_start, row_full_end = row_span.full_start, row_span.full_end
    col_full_start, col_full_end = col_span.full_start, col_span.full_end
    if ROW_ROLE and COL_ROLE:
        row_full_end = tl.minimum(row_full_end, col_span.start)
        col_full_start = tl.maximum(col_full_start, row_span.end)
    start = tl.minimum(row_span.start, col_span.start)
    end = tl.maximum(row_span.end, col_span.end)
    row_full = tl.maximum(row_full_end - row_full_start, 0) if ROW_ROLE else 0
    col_full = tl.maximum(col_full_end - col_full_start, 0) if COL_ROLE else 0

    PADDED_S: tl.constexpr = padded_dim(D_S)
    acc = tl.zeros([BLOCK_M, PADDED_S], tl.float32)
    # A column meets the rows of all `group` row heads of its head; a row meets one column head.
    passes = group if COL_ROLE else 1
    for step in range(passes):
        head = ih * group + step if COL_ROLE else ih // group
        swept_s = swept.s + ib * swept_strides.s.batch + head * swept_strides.s.head
        swept_t = swept.t + ib * swept_strides.t.batch + head * swept_strides.t.head
        y = Pair(
            Vectors(swept_s, swept_strides.s.vector, m),
            Vectors(swept_t, swept_strides.t.vector, m),
        )
        offset = (ib * heads * passes + head) * m
        swept_stats = RowStatistics(
            stats.lse_s + offset, stats.lse_t + offset, stats.weight + offset
        )
        if ROW_ROLE:
            for tile in range(row_full_start, row_full_start + row_full):
                acc = _add_tile(
                    acc, x, y, tile * BLOCK_N, block_stats, swept_stats, visible, viewers, scale,
                    D_S, D_T, BLOCK_N, ROW_ROLE=True, COL_ROLE=False, MASKED=False,
                    WEIGHTED=WEIGHTED, LOG2_GAIN=LOG2_GAIN,
                )  # fmt: skip
        if COL_ROLE:
            for tile in range(col_full_start, col_full_start + col_full):
                acc = _add_tile(
                    acc, x, y, tile * BLOCK_N, block_stats, swept_stats, visible, viewers, scale,
                    D_S, D_T, BLOCK_N, ROW_ROLE=False, COL_ROLE=True, MASKED=False,
                    WEIGHTED=WEIGHTED, LOG2_GAIN=LOG2_GAIN,
                )  # fmt: skip
        for edge in range(start, end - row_full - col_full):
            tile = edge
            if ROW_ROLE:
                tile = tl.where(tile < row_full_start, tile, tile + row_full)
            if COL_ROLE:
                tile = tl.where(tile < col_full_start, tile, tile + col_full)
            acc = _add_tile(
                acc, x, y, tile * BLOCK_N, block_stats, swept_stats, visible, viewers, scale,
                D_S, D_T, BLOCK_N, ROW_ROLE, COL_ROLE, MASKED=True,
                WEIGHTED=WEIGHTED, LOG2_GAIN=LOG2_GAIN,
            )  # fmt: skip

    acc = acc * grad_scale
    if HAS_UNIT:
        acc = acc * tl.load(unit)
    grad += ib * grad_strides.batch + ih * grad_strides.head
    grad += tl.cast(block_start, tl.int64) * grad_strides.vector
    r = tl.arange(0, BLOCK_M)[:, None]
    c = tl.arange(0, PADDED_S)[None, :]
    tl.store(
        grad + (r * grad_strides.vector + c),
        acc.to(grad.dtype.element_ty),
        mask=(block_start + r < n) & (c < D_S),
    )


def triton_backward(
    op: Operands, lse_s: Tensor, lse_t: Tensor, row_weight: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of sum_i w_i KL_i: (of the rows, of the columns or None if self).

    A self relation takes one launch, two operands take one launch each.

    Args:
        op: The operands; the last dimension of each is contiguous.
        lse_s, lse_t: [b, Ha, n] fp32, nats.
        row_weight: [b, Ha, n] fp32, any strides; None means 1.
        out_dtype: dtype of the gradients. The interpreter returns fp32 instead.
    """
    weight, unit = split_weight(row_weight, op.rows_s.dtype)
    stats = (lse_s.contiguous(), lse_t.contiguous(), weight)
    rows, cols = Pair(op.rows_s, op.rows_t), Pair(op.cols_s, op.cols_t)
    if op.is_self:
        return _launch(op, rows, rows, stats, unit, out_dtype, row_role=True, col_role=True), None
    return (
        _launch(op, rows, cols, stats, unit, out_dtype, row_role=True, col_role=False),
        _launch(op, cols, rows, stats, unit, out_dtype, row_role=False, col_role=True),
    )


def split_weight(
    row_weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return a row weight as (weight per row, one factor of the entire gradient).

    Each is None where it is 1. A weight that is one expanded number, as the gradient of a sum or a
    mean is, becomes the factor and costs nothing per tile. For fp16 operands the weights are
    normalized to |w| <= 1, see FP16_LOG2_GAIN.

    Args:
        row_weight: [b, Ha, n] fp32, or None.
        dtype: dtype of the operands.

    Returns:
        [b, Ha, n] contiguous or None, and a tensor whose first element is the factor or None.
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
    block: Pair,
    swept: Pair,
    stats: tuple[Tensor, Tensor, Tensor | None],
    unit: Tensor | None,
    out_dtype: torch.dtype,
    *,
    row_role: bool,
    col_role: bool,
) -> Tensor:
    """Return the gradient of ``block.s`` in the given roles, [b, heads, n, d]."""
    lse_s, lse_t, weight = stats
    mask = op.mask
    b, heads, n, d_s = block.s.shape
    m, d_t = swept.t.shape[2:]
    block_m, block_n, warps, stages = tiles.choose_tiles(tiles.BACKWARD_TILES, *block, *swept)
    log2_gain = FP16_LOG2_GAIN if block.s.dtype == torch.float16 else 0
    # The interpreter truncates where it stores bf16, so there the caller rounds an fp32 result.
    grad = torch.empty_like(block.s, dtype=torch.float32 if tiles.INTERPRETED else out_dtype)
    with torch.cuda.device_of(grad):
        _backward_kernel[(triton.cdiv(n, block_m) * b * heads,)](
            block,
            swept,
            RowStatistics(lse_s, lse_t, lse_s if weight is None else weight),
            lse_s if unit is None else unit,
            Interval(mask.col_lo_bn.contiguous(), mask.col_hi_bn.contiguous()),
            Interval(mask.row_lo_bm.contiguous(), mask.row_hi_bm.contiguous()),
            grad,
            Pair(strides_of(block.s), strides_of(block.t)),
            Pair(strides_of(swept.s), strides_of(swept.t)),
            strides_of(grad),
            b,
            heads,
            op.group,
            n,
            m,
            tiles.section_heads(b * heads, *swept),
            Pair(op.scale_s * tiles.LOG2E.value, op.scale_t * tiles.LOG2E.value),
            op.scale_s * 2.0**-log2_gain,
            D_S=d_s,
            D_T=d_t,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            ROW_ROLE=row_role,
            COL_ROLE=col_role,
            WEIGHTED=weight is not None,
            HAS_UNIT=unit is not None,
            LOG2_GAIN=log2_gain,
            num_warps=warps,
            num_stages=stages,
        )
    return grad
