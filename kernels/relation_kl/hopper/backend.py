"""The Hopper kernels as a back end, and which relations they serve.

The kernels are written in Gluon, whose interface changes between versions of triton, and use
instructions that only GPUs of compute capability 9.x have. ``triton`` serves everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Operands
from ..statistics import Partials, RelationStatistics

try:
    import triton

    from ..triton import tiles
    from .backward import hopper_backward
    from .forward import hopper_forward

    UNAVAILABLE: str | None = None
    if not triton.__version__.startswith(("3.6.", "3.7.")):
        UNAVAILABLE = (
            "the Hopper kernels were tested with triton 3.6 and 3.7 only, "
            f"and triton {triton.__version__} is installed"
        )
except ImportError as error:
    tiles = hopper_forward = hopper_backward = None
    UNAVAILABLE = f"the Hopper kernels cannot be imported: {error}"

NAME, FAMILY = "Hopper", "triton"
DTYPES, HEAD_DIMS = (torch.bfloat16, torch.float16), (64, 128)


def why_not_on(device: torch.device) -> str | None:
    """Return why the kernels serve no call on a device, or None if they serve some."""
    if device.type != "cuda":
        return f"the Hopper kernels need a CUDA device, not {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"the Hopper kernels need compute capability 9.x, and this GPU has {major}.{minor}"
    if UNAVAILABLE is not None:
        return UNAVAILABLE
    if tiles.INTERPRETED:
        return "the Hopper kernels cannot run in Triton's interpreter: unset TRITON_INTERPRET"
    return None


def why_not(op: Operands, *, backward: bool, by_name: bool) -> str | None:
    """Return why the kernels do not serve a call, or None if they do."""
    reason = why_not_on(op.rows_s.device)
    if reason is not None:
        return reason
    for name in ("rows_s", "rows_t", "cols_s", "cols_t"):
        x = getattr(op, name)
        if x.dtype not in DTYPES:
            return f"the Hopper kernels need bf16 or fp16 operands, and {name} is {x.dtype}"
        if x.shape[3] not in HEAD_DIMS:
            return f"the Hopper kernels need head_dim 64 or 128, and {name} has {x.shape[3]}"
        # An operand whose last dimension is strided is copied before the kernels read it.
        if x.stride(3) == 1 and not tma_accepts(x):
            return (
                f"the copy engine of Hopper GPUs cannot read {name} with strides {x.stride()} "
                f"from address {x.data_ptr()}: it needs positive multiples of 16 bytes"
            )
    if backward and op.is_self and not op.mask.causal:
        # Block i must be the last one to add to tile i, see ``scheduler.backward_order``.
        return "the backward of the Hopper kernels needs a causal mask for a self relation"
    return None


def forward(op: Operands, partial: bool) -> RelationStatistics | Partials:
    """Return the statistics of each row, or its partials over the given columns."""
    return hopper_forward(op.with_unit_strides(), partial)


def backward(
    op: Operands, lse_s: Tensor, lse_t: Tensor, row_weight: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of sum_i w_i KL_i: (of the rows, of the columns or None if self)."""
    return hopper_backward(op.with_unit_strides(), lse_s, lse_t, row_weight, out_dtype)


def tma_accepts(x: Tensor) -> bool:
    """Return whether the copy engine can read ``x`` [b, heads, length, d] as it lies in memory.

    The engine needs a contiguous last dimension, an address and strides that are multiples of 16
    bytes, and strides above 0 and below 2^40 bytes. The stride of a dimension of size 1 is free.
    """
    steps = [
        stride * x.element_size()
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
        if size > 1
    ]
    return (
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(0 < step < 1 << 40 and step % 16 == 0 for step in steps)
    )
