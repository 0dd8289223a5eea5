"""Tile sizes of the Hopper kernels, and the device code that their forward and backward share.

``triton.tiles`` defines block, tile, full, edge and allowed. Here a block is always rows, and a
tile is always columns. In addition:

* A *warpgroup* is four warps of 128 threads in total. It multiplies matrices together (the
  instruction ``wgmma``); its accumulators have 64 rows.
* The *copy engine* (TMA) copies rectangles of a tensor between device memory and shared memory, as
  a ``TensorDescriptor`` describes them.
* A *barrier* (``mbarrier``) in shared memory counts arrivals, of threads or of copied bytes. It
  completes a *phase* when the expected number has arrived. A wait names the parity of the phase.
* A *stage* is one of the shared-memory buffers that a producer fills in turn and consumers free
  (``kernels`` only; elsewhere a stage is a phase of a run).
* A *partition* is the part of a program that some of its warps run (warp specialization).
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..triton.tiles import BEYOND, Interval, TileSpan

# Rows of one warpgroup: the number of rows of a wgmma accumulator.
WARPGROUP_ROWS: gl.constexpr = gl.constexpr(64)
# Columns that a warpgroup multiplies at once, in both kernels. This is a tile of the forward.
STEP_COLUMNS: gl.constexpr = gl.constexpr(64)
# A block of the backward has two warpgroups of rows. A tile of the backward is as long as a block,
# so that tile i of a self relation holds the rows of block i as columns. A tile takes two steps.
BACKWARD_BLOCK_ROWS: gl.constexpr = gl.constexpr(2 * WARPGROUP_ROWS.value)
BACKWARD_TILE_COLUMNS: gl.constexpr = gl.constexpr(BACKWARD_BLOCK_ROWS.value)
STEPS_PER_TILE: gl.constexpr = gl.constexpr(BACKWARD_TILE_COLUMNS.value // STEP_COLUMNS.value)

# Wait for all threads of one partition. Its name is ``thread_barrier`` in triton 3.6.
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


class Descriptors(NamedTuple):
    """TMA descriptors of the four operands."""

    rows_s: TensorDescriptor
    rows_t: TensorDescriptor
    cols_s: TensorDescriptor
    cols_t: TensorDescriptor


class Place(NamedTuple):
    """Where the block of a program stands in the operands."""

    batch: gl.tensor
    row_head: gl.tensor
    col_head: gl.tensor
    row_start: gl.tensor


def tma_descriptor(x: torch.Tensor, vectors: int) -> TensorDescriptor:
    """Return the descriptor that reads [1, 1, vectors, d] at once, and zeros past the length.

    Args:
        x: [b, heads, length, d], 16-bit, accepted by ``backend.tma_accepts``.
        vectors: Number of vectors per copy.
    """
    d = x.shape[3]
    # The stride of a dimension of size 1 is never used, but must be one the copy engine accepts.
    strides = [
        d if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, vectors, d], layout)


@gluon.jit
def as_matrix(x):
    """Return [1, 1, vectors, d] in shared memory as [vectors, d]."""
    return x.reshape([x.shape[2], x.shape[3]])


@gluon.jit
def issue_scores(x, y, acc):
    """Issue the product x y^T without waiting for it; return the accumulator to wait for.

    Args:
        x: [1, 1, 64, d] in shared memory.
        y: [1, 1, columns, d] in shared memory.
        acc: [64, columns] fp32; its values are not used.
    """
    return warpgroup_mma(
        as_matrix(x), as_matrix(y).permute((1, 0)), acc, use_acc=False, is_async=True
    )


# Gluon cannot call Triton's device functions, so the next two exist in both languages.


@gluon.jit
def block_of_program(blocks, heads, section, HEAVY_LAST: gl.constexpr):
    """Return (block, head) of this program, as ``triton.tiles.block_of_program`` does."""
    pid = gl.program_id(0)
    section_start = pid // (section * blocks) * section
    pid_in_section = pid - section_start * blocks
    width = gl.minimum(section, heads - section_start)
    block = pid_in_section // width
    if HEAVY_LAST:
        block = blocks - 1 - block
    return block, section_start + pid_in_section % width


@gluon.jit
def tile_span(intervals, row_start, n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Load the intervals of BLOCK_M rows and return their span, as ``triton.tiles.tile_span`` does.

    Args:
        intervals: ``Interval`` of pointers to [n]: the columns that each row sees.
        row_start: First row of the block.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = row_start + gl.arange(0, BLOCK_M, layout)
    inside = i < n
    lo = gl.load(intervals.lo + i, mask=inside, other=0)
    hi = gl.load(intervals.hi + i, mask=inside, other=0)
    nonempty = lo < hi
    lo = gl.where(nonempty, lo, 0)
    hi = gl.where(nonempty, hi, 0)
    end = gl.cdiv(gl.max(hi, 0), BLOCK_N)
    start = gl.minimum(gl.min(gl.where(nonempty, lo, BEYOND), 0) // BLOCK_N, end)
    full_start = gl.cdiv(gl.max(lo, 0), BLOCK_N)
    full_end = gl.min(gl.where(inside, hi, BEYOND), 0) // BLOCK_N
    any_full = full_start < full_end
    return TileSpan(
        start, gl.where(any_full, full_start, end), gl.where(any_full, full_end, end), end
    )


@gluon.jit
def load_row_intervals(intervals, i, n):
    """Load the ``Interval`` of each row ``i``; it is [0, 0) past ``n``."""
    lo = gl.load(intervals.lo + i, mask=i < n, other=0)
    hi = gl.load(intervals.hi + i, mask=i < n, other=0)
    return Interval(lo, hi)
