"""Sums over logits that exist for a few rows at a time, whatever the length of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

ROWS = 1024


def sum_of_chunks(
    chunk_sum: Callable[..., torch.Tensor],
    row_tensors: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Return Σ over chunks of rows of ``chunk_sum(*rows of row_tensors, *weights)``.

    The backward pass computes each chunk again, so that its logits are not kept.

    Args:
        chunk_sum: returns a scalar.
        row_tensors: tensors with the same number of rows.
        weights: tensors that every chunk needs in full.
    """
    total = row_tensors[0].new_zeros((), dtype=torch.float32)
    for rows in zip(*(x.split(ROWS) for x in row_tensors), strict=True):
        total = total + checkpoint(
            chunk_sum, *rows, *weights, use_reentrant=False, preserve_rng_state=False
        )
    return total
