"""In which order the Hopper backward's blocks of rows add to the columns' gradient."""

import torch
from torch import Tensor

from ..mask import IntervalMask, by_block

BLOCK = 128  # rows of a program, and columns of a tile


def reduction_order(mask: IntervalMask, is_self: bool) -> tuple[Tensor, Tensor]:
    """(spans [2, b, blocks], last_rows [b, tiles]), int32: who visits what.

    Blocks visit the tiles of columns that any of their rows sees, and a few more, so that first and
    last tile never decrease from block to block: then the blocks that visit a tile are consecutive,
    and each knows its turn from the last of them. In a (causal) self relation every block also
    visits its own columns, as the last one to do so. Kept with the mask, which serves many layers.
    """
    return mask.kept(_reduction_order, is_self)


def _reduction_order(mask: IntervalMask, is_self: bool) -> tuple[Tensor, Tensor]:
    live = mask.col_lo_bn < mask.col_hi_bn
    tiles = -(-mask.m // BLOCK)
    lo = torch.where(live, mask.col_lo_bn // BLOCK, tiles)
    hi = torch.where(live, (mask.col_hi_bn + (BLOCK - 1)) // BLOCK, 0)
    lo = by_block(lo, BLOCK, tiles).amin(2)
    hi = by_block(hi, BLOCK, 0).amax(2)
    if is_self:
        own = torch.arange(lo.shape[1], device=lo.device, dtype=lo.dtype)
        lo, hi = torch.minimum(lo, own), (own + 1).expand_as(lo)
    first = lo.flip(1).cummin(1).values.flip(1)
    last = hi.cummax(1).values
    first = torch.minimum(first, last)
    columns = torch.arange(tiles, device=lo.device, dtype=torch.int32).expand(mask.b, -1)
    last_rows = torch.searchsorted(first.contiguous(), columns.contiguous(), right=True) - 1
    return torch.stack((first, last)).to(torch.int32), last_rows.to(torch.int32)
