"""Round trained weights to the dtype of a file, and count what that takes away from them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from megalard.hashing import mixed

# The number of elements that are copied to fp32 at a time.
_BLOCK_ELEMENTS = 2**22


def rounded(
    exact: torch.Tensor, dtype: torch.dtype, name: str, first_row: int = 0, stochastic: bool = False
) -> torch.Tensor:
    """Round some rows of a tensor to a dtype, to the nearest value or stochastically.

    Stochastic rounding takes one of the two neighbors at random, the nearer one more often, so that
    its mean is the exact value. The choice is a hash of the tensor's name and of the place in it:
    the result is the same on any device, in any blocks of rows, and on every call.

    Args:
        exact: fp32 [n], or the rows [rows, n] of a matrix.
        name: the name of the tensor.
        first_row: the place of the first of the rows.
        stochastic: whether to round stochastically. An fp32 ``dtype`` leaves nothing to round.
    """
    nearest = exact.to(dtype)
    if not stochastic or nearest.element_size() != 2 or not nearest.numel():
        return nearest
    seed, table = zlib.crc32(name.encode()), exact.reshape(-1, exact.shape[-1])
    result = nearest.view(table.shape)
    rows = max(1, _BLOCK_ELEMENTS // table.shape[1])
    for start in range(0, len(table), rows):
        block = slice(start, start + rows)
        result[block] = _stochastic(table[block], result[block], seed, first_row + start)
    return nearest


def _stochastic(
    exact: torch.Tensor, nearest: torch.Tensor, seed: int, first_row: int
) -> torch.Tensor:
    """Return ``nearest``, or its neighbor beyond ``exact``, for some rows of a matrix."""
    dtype, error = nearest.dtype, exact - nearest.float()
    bits = nearest.view(torch.int16)
    # The bits of two neighbors of the same sign differ by one. Zero has a neighbor on either side.
    smallest = torch.where(error < 0, -(2**15) + 1, 1).to(torch.int16)
    is_outwards = (error < 0) == (nearest < 0)
    neighbor = torch.where(nearest == 0, smallest, bits + torch.where(is_outwards, 1, -1)).to(bits)
    step = (neighbor.view(dtype).float() - nearest.float()).abs()
    # NaN, infinity and exact values stay: the comparison is false.
    is_moved = _random(exact, seed, first_row) * step < error.abs()
    return torch.where(is_moved, neighbor, bits).view(dtype)


def _random(like: torch.Tensor, seed: int, first_row: int) -> torch.Tensor:
    """Return numbers in [0, 1), fp32, that depend on the seed and on the places of the elements."""
    count, columns = like.shape
    rows = torch.arange(first_row, first_row + count, device=like.device)
    place = rows[:, None] * columns + torch.arange(columns, device=like.device)
    hashed = mixed(mixed(place & 0xFFFFFFFF) ^ mixed(((place >> 32) + seed) & 0xFFFFFFFF))
    return (hashed >> 8).float() * 2.0**-24


@dataclass
class RoundingLoss:
    """How many elements training changed, and how many of them are unchanged in the file.

    Attributes:
        changed: elements that differ from the model that training started from.
        lost: changed elements that rounding makes equal to that model again, because they differ
            from it by less than half a step of the dtype.
    """

    changed: int = 0
    lost: int = 0

    def add(self, before: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count the elements of a tensor or a part of it.

        Args:
            before: the values that training started from.
            exact: the trained values, fp32.
            rounded: the trained values as they are stored.
        """
        flat = (tensor.reshape(-1).split(_BLOCK_ELEMENTS) for tensor in (before, exact, rounded))
        for old, new, stored in zip(*flat, strict=True):
            old = old.to(new)
            is_changed = new != old
            self.changed += int(is_changed.sum())
            self.lost += int((is_changed & (stored.to(new) == old)).sum())

    @property
    def share(self) -> float:
        """The share of the changed elements that is lost."""
        return self.lost / max(1, self.changed)
