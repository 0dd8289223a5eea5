"""Which column tiles each block of rows of the Hopper forward visits, and the blocks' order."""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..mask import IntervalMask, by_block

_FAR = 1 << 30


def block_plan(mask: IntervalMask, rows: int, columns: int) -> Tensor:
    """int32 [b, blocks, 5]: block, first, full_first, full_last, last.

    A block of ``rows`` rows visits the tiles of ``columns`` columns from ``first`` up to ``last``,
    which some of its rows see; all of them see those from ``full_first`` up to ``full_last``
    (both ``last`` where there is none). Blocks with the most tiles come first, so that the last
    ones to start are short. Kept with the mask, which serves many layers.
    """
    return mask.kept(_block_plan, rows, columns)


def _block_plan(mask: IntervalMask, rows: int, columns: int) -> Tensor:
    lo, hi = mask.col_lo_bn, mask.col_hi_bn
    live = lo < hi
    lo_live, hi_live = torch.where(live, lo, 0), torch.where(live, hi, 0)
    last = -(-by_block(hi_live, rows, 0).amax(2) // columns)
    first = torch.minimum(
        by_block(torch.where(live, lo, _FAR), rows, _FAR).amin(2) // columns, last
    )
    full_first = -(-by_block(lo_live, rows, 0).amax(2) // columns)
    full_last = by_block(hi_live, rows, _FAR).amin(2) // columns
    some = full_first < full_last
    full_first, full_last = torch.where(some, full_first, last), torch.where(some, full_last, last)
    order = torch.argsort(last - first, dim=1, descending=True, stable=True)
    spans = torch.stack((first, full_first, full_last, last))
    plan = torch.stack((order, *spans.gather(2, order.expand(4, -1, -1))), 2)
    return plan.to(torch.int32).contiguous()


@gluon.jit
def tile_of_step(step, span):
    """The tile of a block's step: those after the full ones, backwards, those before, the full."""
    first, full_first, full_last, last = span
    after = last - full_last
    edges = after + full_first - first
    edge = gl.where(step < after, last - 1 - step, full_first - 1 - (step - after))
    return gl.where(step < edges, edge, full_first + step - edges)
