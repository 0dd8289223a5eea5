"""The order in which the Hopper backward keeps the columns' gradient in device memory.

A *slab* is the gradient of 64 columns: an accumulator [64, d] in the order in which it lies in a
warpgroup's registers, as [d / 8, 128, 4]. That is four registers of each of 128 threads, thread
after thread, d / 8 times. So a thread adds 16 bytes at a time, and a warp 512 consecutive bytes.
(FlashAttention-2, arXiv 2307.08691, accumulates its dQ in a private order as well.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .tiles import STEP_COLUMNS

SLAB_COLUMNS: gl.constexpr = gl.constexpr(STEP_COLUMNS.value)


@gluon.constexpr_function
def slab_layout(D):
    """Return the layout of a slab [D / 8, 128, 4]: axes 0 and 2 are registers, axis 1 threads."""
    registers, step = [[0, 0, 1], [0, 0, 2]], 1
    while step < D // 8:
        registers.append([step, 0, 0])
        step *= 2
    lanes = [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]]
    warps = [[0, 32, 0], [0, 64, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [D // 8, 128, 4])


@gluon.jit
def to_slab(x):
    """Return an accumulator [64, D] as a slab [D / 8, 128, 4]; no data moves.

    A row of the accumulator is (warp, half of its 16 rows, lane // 4). A column is (group of eight
    columns, lane % 4, one of two neighbors).
    """
    D: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, [4, 2, 8, D // 8, 4, 2]), (3, 0, 2, 4, 1, 5))
    return gl.convert_layout(gl.reshape(x, [D // 8, 128, 4]), slab_layout(D), assert_trivial=True)


@gluon.jit
def from_slab(x, layout: gl.constexpr):
    """Return a slab [D / 8, 128, 4] as an accumulator [64, D] in ``layout``; no data moves."""
    D: gl.constexpr = x.shape[0] * 8
    x = gl.permute(gl.reshape(x, [D // 8, 4, 8, 4, 2, 2]), (1, 4, 2, 0, 3, 5))
    return gl.convert_layout(gl.reshape(x, [64, D]), layout, assert_trivial=True)


@gluon.jit
def slab_offsets(D: gl.constexpr):
    """Return the offset of each element of a slab from its start, [D / 8, 128, 4]."""
    layout: gl.constexpr = slab_layout(D)
    i = gl.arange(0, D // 8, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    j = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    k = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    i = gl.expand_dims(gl.expand_dims(i, 1), 2)
    j = gl.expand_dims(gl.expand_dims(j, 0), 2)
    return i * 512 + j * 4 + gl.expand_dims(gl.expand_dims(k, 0), 1)


@triton.jit
def _columns_kernel(
    buffer,
    turns,
    unit,
    out,
    m,
    tiles,
    scale,
    COPIES: tl.constexpr,
    SLABS_PER_TILE: tl.constexpr,
    D: tl.constexpr,
    HAS_UNIT: tl.constexpr,
):
    """Write the gradient of 64 columns of one head: the sum of the copies, times scale and unit.

    Args:
        buffer: [b * heads * COPIES, tiles * SLABS_PER_TILE] slabs, fp32.
        turns: int32 [b * heads * COPIES, tiles]: how many blocks have added to each tile.
        unit: One fp32 number, if HAS_UNIT.
        out: [b * heads, m, D].
    """
    slab = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    r = tl.arange(0, 64)[:, None]
    c = tl.arange(0, D)[None, :]
    thread = r // 16 * 32 + r % 8 * 4 + c % 8 // 2
    offsets = c // 8 * 512 + thread * 4 + r % 16 // 8 * 2 + c % 2
    total = tl.zeros([64, D], tl.float32)
    for copy in range(COPIES):
        buffer_head = head * COPIES + copy
        # The kernel does not write tiles that no block visits.
        visits = tl.load(turns + buffer_head * tiles + slab // SLABS_PER_TILE)
        pointers = buffer + (buffer_head * tiles * SLABS_PER_TILE + slab) * (64 * D)
        total += tl.load(pointers + offsets, mask=visits > 0, other=0.0)
    if HAS_UNIT:
        scale *= tl.load(unit)
    r += slab * 64
    out += head * m * D
    tl.store(out + (r * D + c), (total * scale).to(out.dtype.element_ty), mask=r < m)


def columns_gradient(
    buffer: Tensor,
    turns: Tensor,
    cols: Tensor,
    scale: float,
    unit: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the columns' gradient, summed over the buffers that the blocks of rows added to.

    Args:
        buffer: fp32 [b, heads * copies, tiles * columns per tile, d], in slabs. The copies are
            summed.
        turns: int32 [b, heads * copies, tiles]: how many blocks have added to each tile. Tiles with
            0 were never written and count as 0.
        cols: [b, heads, m, d], the operand that the gradient is for.
        scale: Factor of the gradient.
        unit: A tensor whose first element is a further factor, or None.
        dtype: dtype of the gradient.

    Returns:
        [b, heads, m, d], contiguous.
    """
    b, heads, m, d = cols.shape
    tiles = turns.shape[2]
    out = torch.empty(b, heads, m, d, dtype=dtype, device=buffer.device)
    with torch.cuda.device_of(buffer):
        _columns_kernel[(triton.cdiv(m, SLAB_COLUMNS.value), b * heads)](
            buffer,
            turns,
            buffer if unit is None else unit,
            out,
            m,
            tiles,
            scale,
            COPIES=buffer.shape[1] // heads,
            SLABS_PER_TILE=buffer.shape[2] // tiles // SLAB_COLUMNS.value,
            D=d,
            HAS_UNIT=unit is not None,
        )
    return out
