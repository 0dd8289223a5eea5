"""Which relations the Hopper kernels serve.

The kernels are written in Gluon, whose interface changes between versions of triton, and use
instructions that only compute capability 9.x has. Everything else takes the plain Triton kernels.
"""

import torch
from torch import Tensor

from ..operands import Operands
from ..triton import tiles as tiling

try:
    import triton

    from .backward import hopper_backward
    from .forward import hopper_forward

    # Under triton 3.7 they compile (tests/kernels/compile_hopper.py) but were not run yet.
    AVAILABLE = triton.__version__.startswith("3.6.")
    REASON = "" if AVAILABLE else f"they were run with triton 3.6, this is {triton.__version__}"
except ImportError as error:
    hopper_forward = hopper_backward = None
    AVAILABLE, REASON = False, f"they cannot be imported: {error}"

DTYPES, HEAD_DIMS = (torch.bfloat16, torch.float16), (64, 128)


def serves(op: Operands) -> bool:
    """Whether the Hopper kernels take these operands, as they are."""
    return (
        AVAILABLE
        and not tiling.INTERPRETED
        and op.rows_s.is_cuda
        and torch.cuda.get_device_capability(op.rows_s.device)[0] == 9
        and all(
            x.dtype in DTYPES and x.shape[3] in HEAD_DIMS and tma_accepts(x) for x in _operands(op)
        )
    )


def serves_backward(op: Operands) -> bool:
    """A self relation must be causal: blocks of rows add to their own columns last."""
    return serves(op) and (op.mask.causal or not op.is_self)


def _operands(op: Operands) -> tuple[Tensor, ...]:
    return op.rows_s, op.rows_t, op.cols_s, op.cols_t


def tma_accepts(x: Tensor) -> bool:
    """Whether the copy engine can read [b, heads, length, d] with these strides and this address.

    It wants multiples of 16 bytes, below 2^40 bytes, and sizes below 2^32.
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
