"""The order of work in the Hopper kernels: the forward's plan and the backward's turns.

Forward: the host plans which tiles each block visits (``forward_plan``), and each block visits its
edge tiles first (``forward_tile``).

Backward: the blocks that visit a tile add to its columns' gradient one after another, the later
rows first. The host widens the blocks' spans so that these blocks are consecutive
(``backward_order``). A block can then compute its turn from the last block that visits the tile.
Each block visits its full tiles first (``backward_step_start``).

Plans depend on the mask only and are cached with it, because one mask serves many layers.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..mask import IntervalMask, split_into_blocks
from ..triton.tiles import BEYOND, Interval
from .tiles import BACKWARD_BLOCK_ROWS, BACKWARD_TILE_COLUMNS, STEP_COLUMNS, STEPS_PER_TILE


def forward_plan(mask: IntervalMask, block_rows: int, tile_columns: int) -> Tensor:
    """Return which tiles each block of the forward visits, with the longest blocks first.

    The short blocks start last, so that no long block runs alone at the end of the launch.

    Args:
        mask: The mask of the relation.
        block_rows: Number of rows in a block.
        tile_columns: Number of columns in a tile.

    Returns:
        int32 [b, blocks, 5]: the index of the block, and the four numbers of its ``TileSpan``.
    """
    return mask.cached(_forward_plan, block_rows, tile_columns)


def _forward_plan(mask: IntervalMask, block_rows: int, tile_columns: int) -> Tensor:
    lo, hi, beyond = mask.col_lo_bn, mask.col_hi_bn, BEYOND.value
    nonempty = lo < hi
    lo_or_0, hi_or_0 = torch.where(nonempty, lo, 0), torch.where(nonempty, hi, 0)
    lo_or_beyond = torch.where(nonempty, lo, beyond)
    end = -(-split_into_blocks(hi_or_0, block_rows, 0).amax(2) // tile_columns)
    start = split_into_blocks(lo_or_beyond, block_rows, beyond).amin(2) // tile_columns
    start = torch.minimum(start, end)
    full_start = -(-split_into_blocks(lo_or_0, block_rows, 0).amax(2) // tile_columns)
    full_end = split_into_blocks(hi_or_0, block_rows, beyond).amin(2) // tile_columns
    any_full = full_start < full_end
    full_start = torch.where(any_full, full_start, end)
    full_end = torch.where(any_full, full_end, end)
    order = torch.argsort(end - start, dim=1, descending=True, stable=True)
    spans = torch.stack((start, full_start, full_end, end))
    plan = torch.stack((order, *spans.gather(2, order.expand(4, -1, -1))), 2)
    return plan.to(torch.int32).contiguous()


@gluon.jit
def forward_tile(step, span):
    """Return the tile that a block of the forward visits at a step.

    It visits the edge tiles after the full ones, then the edge tiles before the full ones, both in
    descending order, and then the full tiles in ascending order.
    """
    after = span.end - span.full_end
    edges = after + span.full_start - span.start
    edge = gl.where(step < after, span.end - 1 - step, span.full_start - 1 - (step - after))
    return gl.where(step < edges, edge, span.full_start + step - edges)


@gluon.jit
def exact_steps(allowed, span, TILE_COLUMNS: gl.constexpr):
    """Return the columns that any row of a warpgroup sees, and the number of exact steps.

    The exact steps come first and must keep running maxima. After them every row that sees a column
    has met at least one tile with such a column. One more tile has followed, unless the tile that
    the row met is the first full one.

    Args:
        allowed: ``Interval`` of the columns that each row of the warpgroup sees.
        span: ``TileSpan`` of the block; it visits its tiles in the order of ``forward_tile``.

    Returns:
        (``Interval`` that spans the columns of all rows, number of exact steps).
    """
    nonempty = allowed.lo < allowed.hi
    visible_start = gl.min(gl.where(nonempty, allowed.lo, BEYOND), 0)
    visible_end = gl.max(gl.where(nonempty, allowed.hi, 0), 0)
    # Edge tiles are visited in descending order, so each row meets the tile of its last column
    # before its other edge tiles. Hence the row with the smallest last column is the last to meet a
    # tile. If the tile of that column is full, all rows see the first full tile, which follows the
    # edge tiles.
    lowest = (gl.min(gl.where(nonempty, allowed.hi, BEYOND), 0) - 1) // TILE_COLUMNS
    edges = span.end - span.start - (span.full_end - span.full_start)
    in_edges = (lowest >= span.full_end) | (span.full_start == span.full_end)
    met = gl.where(in_edges, gl.maximum(span.end - lowest, 0), edges)
    return Interval(visible_start, visible_end), gl.minimum(met + 1, span.end - span.start)


def backward_order(mask: IntervalMask, is_self: bool) -> tuple[Tensor, Tensor]:
    """Return which tiles each block of the backward visits, and the last block to visit each tile.

    A block visits the tiles that any of its rows sees, and a few more, so that neither the start
    nor the end of the spans decreases from block to block. Hence the blocks that visit a tile are
    consecutive. In a self relation, which must be causal, block i also visits tile i, which holds
    its rows as columns. No earlier block does, so block i is the last one to add to tile i.

    Args:
        mask: The mask of the relation.
        is_self: Whether the columns are the rows.

    Returns:
        spans, int32 [2, b, blocks]: start and end of the tiles of each block.
        last_blocks, int32 [b, tiles]: the last block that visits each tile.
    """
    return mask.cached(_backward_order, is_self)


def _backward_order(mask: IntervalMask, is_self: bool) -> tuple[Tensor, Tensor]:
    rows, columns = BACKWARD_BLOCK_ROWS.value, BACKWARD_TILE_COLUMNS.value
    nonempty = mask.col_lo_bn < mask.col_hi_bn
    tiles = -(-mask.m // columns)
    start = torch.where(nonempty, mask.col_lo_bn // columns, tiles)
    end = torch.where(nonempty, (mask.col_hi_bn + (columns - 1)) // columns, 0)
    start = split_into_blocks(start, rows, tiles).amin(2)
    end = split_into_blocks(end, rows, 0).amax(2)
    if is_self:
        block = torch.arange(start.shape[1], device=start.device, dtype=start.dtype)
        start, end = torch.minimum(start, block), (block + 1).expand_as(start)
    start = start.flip(1).cummin(1).values.flip(1)
    end = end.cummax(1).values
    start = torch.minimum(start, end)
    tile = torch.arange(tiles, device=start.device, dtype=torch.int32).expand(mask.b, -1)
    last_blocks = torch.searchsorted(start.contiguous(), tile.contiguous(), right=True) - 1
    return torch.stack((start, end)).to(torch.int32), last_blocks.to(torch.int32)


@gluon.jit
def backward_tile(index, span):
    """Return the index-th tile that a block of the backward visits.

    It visits the full tiles, then the edge tiles before them, then the edge tiles after them, all
    in ascending order.
    """
    full = span.full_end - span.full_start
    edge = span.start + index - full
    edge = gl.where(edge < span.full_start, edge, edge + full)
    return gl.where(index < full, span.full_start + index, edge)


@gluon.jit
def backward_step_start(step, span):
    """Return the first column of a step of the backward; every tile takes two steps in a row."""
    tile = backward_tile(step // STEPS_PER_TILE, span)
    return tile * BACKWARD_TILE_COLUMNS + (step & 1) * STEP_COLUMNS


@gluon.jit
def backward_turn(last_block, block, row_head, share):
    """Return how many additions to a tile precede the addition of a block and head.

    Later blocks add first; the heads of one block add in ascending order.

    Args:
        last_block: The last block that visits the tile.
        block: The block.
        row_head: The row head of the block.
        share: Number of consecutive row heads that add to the same columns, one after another.
    """
    return (last_block - block) * share + row_head % share
