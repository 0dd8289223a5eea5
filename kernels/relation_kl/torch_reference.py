"""The relation KL in plain torch, block by block: the back end of CPUs, and of float64 operands.

Memory is linear in the sequence: no tensor is larger than the operands or one tile of scores.
Tiles of columns that a block of rows does not see are not visited. Sums are fp32, or fp64 for fp64
operands. The equations are in ``statistics`` and, for the gradient, in ``torch_backward``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .mask import IntervalMask, split_into_blocks
from .operands import Operands
from .statistics import Partials, RelationStatistics, finish, merge

NAME, FAMILY = "plain torch", "torch"

# Measured on one core: larger tiles leave the L2 cache, and blocks of more rows compute more scores
# above the diagonal.
BLOCK_ROWS = 64
TILE_ELEMENTS = 1 << 18  # scores of one tile, over all heads of a sequence
NEG_INF = float("-inf")


class Tile(NamedTuple):
    """A block of rows times some consecutive columns.

    Attributes:
        allowed: Which pairs are allowed, bool [rows, cols]; None if all are.
    """

    rows: slice
    cols: slice
    allowed: Tensor | None


def why_not_on(device: torch.device) -> str | None:
    """Return None: plain torch serves every device."""
    return None


def why_not(op: Operands, *, backward: bool, by_name: bool) -> str | None:
    """Return None: plain torch serves every call."""
    return None


def forward(op: Operands, partial: bool) -> RelationStatistics | Partials:
    """Return the statistics of each row, or its partials over the given columns."""
    partials = torch_partials(op)
    return partials if partial else finish(partials)


def backward(
    op: Operands, lse_s: Tensor, lse_t: Tensor, row_weight: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of sum_i w_i KL_i in the accumulation dtype; the caller converts."""
    return torch_backward(op, lse_s, lse_t, row_weight)


def torch_partials(op: Operands) -> Partials:
    """Return the partials of each row over the given columns, each [b, Ha, n]."""
    b, heads, n, _ = op.rows_s.shape
    out = op.rows_s.new_zeros(5, b, heads, n, dtype=op.accumulate_dtype)
    out[0], out[2] = NEG_INF, NEG_INF
    for i in range(b):
        x_s, y_s, x_t, y_t = _sequence(op, i)
        for tiles in _blocks(op.mask, i, heads):
            parts = [
                _tile_partials(_scores(x_s, y_s, tile), _scores(x_t, y_t, tile), tile.allowed)
                for tile in tiles
            ]
            merged = torch.stack(reduce(merge, parts))
            out[:, i, :, tiles[0].rows] = merged.flatten(1, 2)
    return Partials(*out)


def torch_backward(
    op: Operands, lse_s: Tensor, lse_t: Tensor, row_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of sum_i w_i KL_i: (of the rows, of the columns or None if self).

    With D_ij = w_i (exp(S_ij - lse_s_i) - exp(T_ij - lse_t_i)) over the allowed pairs, they are
    scale_s D B_s for the rows A_s and scale_s D^T A_s for the columns B_s (LinearARD, arXiv
    2604.00004). A self relation gets their sum. They have the accumulation dtype.

    Args:
        op: The operands.
        lse_s, lse_t: [b, Ha, n], nats.
        row_weight: w, [b, Ha, n]; None means 1.
    """
    grad_rows = torch.zeros_like(op.rows_s, dtype=op.accumulate_dtype)
    grad_cols = grad_rows if op.is_self else torch.zeros_like(op.cols_s, dtype=op.accumulate_dtype)
    heads_shape = (op.cols_s.shape[1], op.group)
    for i in range(op.rows_s.shape[0]):
        x_s, y_s, x_t, y_t = _sequence(op, i)
        stats = [
            None if x is None else x[i].unflatten(0, heads_shape).unsqueeze(-1)
            for x in (lse_s, lse_t, row_weight)
        ]
        for tiles in _blocks(op.mask, i, op.rows_s.shape[1]):
            for tile in tiles:
                s, t = _scores(x_s, y_s, tile), _scores(x_t, y_t, tile)
                tile_lse_s, tile_lse_t, weight = (
                    None if x is None else x[:, :, tile.rows] for x in stats
                )
                delta = s.sub_(tile_lse_s).exp_().sub_(t.sub_(tile_lse_t).exp_())
                if weight is not None:
                    delta.mul_(weight)
                if tile.allowed is not None:
                    delta.masked_fill_(~tile.allowed, 0.0)
                delta = delta.flatten(1, 2)
                x_block = x_s[:, :, tile.rows].flatten(1, 2)
                rows_part = torch.bmm(delta, y_s[:, tile.cols]).mul_(op.scale_s)
                grad_rows[i, :, tile.rows] += rows_part.unflatten(1, (op.group, -1)).flatten(0, 1)
                cols_part = torch.bmm(delta.mT, x_block)  # x_block carries scale_s
                grad_cols[i, :, tile.cols] += cols_part
    return grad_rows, None if op.is_self else grad_cols


def _sequence(op: Operands, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sequence i as (rows_s, cols_s, rows_t, cols_t) in the accumulation dtype.

    The rows are scaled, [Hb, group, n, d]; the columns are [Hb, m, d].
    """
    shape = (op.cols_s.shape[1], op.group)
    sides = []
    for rows, cols, scale in (
        (op.rows_s, op.cols_s, op.scale_s),
        (op.rows_t, op.cols_t, op.scale_t),
    ):
        sides.append(rows[i].to(op.accumulate_dtype).mul(scale).unflatten(0, shape))
        sides.append(cols[i].to(op.accumulate_dtype))
    return tuple(sides)


def _scores(x: Tensor, y: Tensor, tile: Tile) -> Tensor:
    """Return the scores of a tile, [Hb, group, rows, cols], from scaled rows x and columns y."""
    block = x[:, :, tile.rows]
    scores = torch.bmm(block.flatten(1, 2), y[:, tile.cols].mT)
    return scores.view(*block.shape[:3], -1)


def _tile_partials(s: Tensor, t: Tensor, allowed: Tensor | None) -> Partials:
    """Return the partials of one tile of scores [..., rows, cols]; overwrite s and t."""
    gap = t - s
    m, sums = [], []
    for scores in (s, t):
        if allowed is not None:
            scores.masked_fill_(~allowed, NEG_INF)
        top = scores.amax(-1)
        # A row without allowed columns in this tile would give -inf - -inf.
        scores.sub_(top.masked_fill(top == NEG_INF, 0.0).unsqueeze(-1)).exp_()
        m.append(top)
        sums.append(scores.sum(-1))
    return Partials(m[0], sums[0], m[1], sums[1], gap.mul_(t).sum(-1))


def _blocks(mask: IntervalMask, i: int, heads: int) -> Iterator[list[Tile]]:
    """Yield the tiles that each block of rows of sequence i visits; skip blocks that visit none."""
    n, width = mask.n, max(16, TILE_ELEMENTS // (heads * BLOCK_ROWS))
    lo, hi = mask.col_lo_bn[i], mask.col_hi_bn[i]
    extremes = mask.cached(_extremes, BLOCK_ROWS)[i]
    for block, (visible_start, full_start, full_end, visible_end) in enumerate(extremes):
        rows = slice(block * BLOCK_ROWS, min(n, (block + 1) * BLOCK_ROWS))
        tiles = []
        for start in range(visible_start, visible_end, width):
            cols = slice(start, min(start + width, visible_end))
            allowed = None
            if start < full_start or cols.stop > full_end:
                j = torch.arange(cols.start, cols.stop, device=mask.device, dtype=torch.int32)
                allowed = (j >= lo[rows, None]) & (j < hi[rows, None])
            tiles.append(Tile(rows, cols, allowed))
        if tiles:
            yield tiles


def _extremes(mask: IntervalMask, block_rows: int) -> list[list[tuple[int, int, int, int]]]:
    """Return the columns of each block of rows of each sequence, which the host reads once.

    They are (visible_start, full_start, full_end, visible_end): some row of the block sees the
    columns from visible_start to visible_end, and every row sees those from full_start to full_end.
    """
    is_empty = mask.col_lo_bn >= mask.col_hi_bn
    lo, hi = mask.col_lo_bn.masked_fill(is_empty, mask.m), mask.col_hi_bn.masked_fill(is_empty, 0)
    extremes = [
        split_into_blocks(lo, block_rows, mask.m).amin(2),
        split_into_blocks(lo, block_rows, 0).amax(2),
        split_into_blocks(hi, block_rows, mask.m).amin(2),
        split_into_blocks(hi, block_rows, 0).amax(2),
    ]
    return torch.stack(extremes, dim=2).tolist()
