"""What the Hopper kernels share: their tiles, and how the copy engine reads the operands."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS: gl.constexpr = gl.constexpr(64)  # of one warpgroup
FAR: gl.constexpr = gl.constexpr(2147483647)  # past every column
# Of one partition's threads. triton 3.7 calls it by another name.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def flat(x):
    """[1, 1, rows, d] in shared memory as [rows, d]."""
    return x.reshape([x.shape[2], x.shape[3]])


@gluon.jit
def rows_by_cols(x, y, acc):
    """acc = x y^T, issued but not awaited: x [1, 1, 64, d] and y [1, 1, columns, d] in smem."""
    return warpgroup_mma(flat(x), flat(y).permute((1, 0)), acc, use_acc=False, is_async=True)


@gluon.jit
def own_block(blocks, heads, section, HEAVY_LAST: gl.constexpr):
    """As `tiling.own_block`."""
    pid = gl.program_id(0)
    first_head = pid // (section * blocks) * section
    within = pid - first_head * blocks
    width = gl.minimum(section, heads - first_head)
    block = within // width
    if HEAVY_LAST:
        block = blocks - 1 - block
    return block, first_head + within % width


@gluon.jit
def tile_range(col_lo, col_hi, start, n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """As `tiling.tile_range`, of the rows from ``start``: first, full_first, full_last, last."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = start + gl.arange(0, BLOCK_M, layout)
    inside = i < n
    lo = gl.load(col_lo + i, mask=inside, other=0)
    hi = gl.load(col_hi + i, mask=inside, other=0)
    live = lo < hi
    lo = gl.where(live, lo, 0)
    hi = gl.where(live, hi, 0)
    last = gl.cdiv(gl.max(hi, 0), BLOCK_N)
    first = gl.minimum(gl.min(gl.where(live, lo, FAR), 0) // BLOCK_N, last)
    full_first = gl.cdiv(gl.max(lo, 0), BLOCK_N)
    full_last = gl.min(gl.where(inside, hi, FAR), 0) // BLOCK_N
    some = full_first < full_last
    return first, gl.where(some, full_first, last), gl.where(some, full_last, last), last


def descriptor(x: torch.Tensor, vectors: int) -> TensorDescriptor:
    """Reads blocks of ``vectors`` vectors of [b, heads, length, d]; zeros past the length."""
    d = x.shape[3]
    # The stride of a dimension of size 1 is never used, but must be one the copy engine accepts.
    strides = [
        d if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, vectors, d], layout)
