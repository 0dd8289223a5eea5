"""The Triton kernels as a back end: every GPU, every dtype but float64, every mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Operands
from ..statistics import Partials, RelationStatistics

try:
    from . import tiles
    from .backward import triton_backward
    from .forward import triton_forward

    UNAVAILABLE: str | None = None
except ImportError as error:
    tiles = triton_backward = triton_forward = None
    UNAVAILABLE = f"the Triton kernels need the triton package, which cannot be imported: {error}"

NAME, FAMILY = "Triton", "triton"


def why_not_on(device: torch.device) -> str | None:
    """Return why the kernels serve no call on a device, or None if they serve some."""
    if UNAVAILABLE is not None:
        return UNAVAILABLE
    if device.type != "cuda":
        return "the Triton kernels need CUDA tensors, or TRITON_INTERPRET=1 set before the import"
    return None


def why_not(op: Operands, *, backward: bool, by_name: bool) -> str | None:
    """Return why the kernels do not serve a call, or None if they do.

    The interpreter runs the kernels on CPU tensors, slowly, so it counts only if the caller asks
    for Triton by name.
    """
    if UNAVAILABLE is None and op.accumulate_dtype == torch.float64:
        return "the Triton kernels have no float64; use backend 'torch'"
    interpreted = by_name and UNAVAILABLE is None and tiles.INTERPRETED
    return None if interpreted else why_not_on(op.rows_s.device)


def forward(op: Operands, partial: bool) -> RelationStatistics | Partials:
    """Return the statistics of each row, or its partials over the given columns."""
    return triton_forward(op.with_unit_strides(), partial)


def backward(
    op: Operands, lse_s: Tensor, lse_t: Tensor, row_weight: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of sum_i w_i KL_i: (of the rows, of the columns or None if self)."""
    return triton_backward(op.with_unit_strides(), lse_s, lse_t, row_weight, out_dtype)
