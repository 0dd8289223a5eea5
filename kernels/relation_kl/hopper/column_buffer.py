"""The order in which the Hopper backward keeps the columns' gradient in device memory.

64 columns are a slab: an accumulator [64, d] in the order in which it lies in a warpgroup's
registers, as [d / 8, 128, 4]: four registers of each of 128 threads, thread after thread. So a
thread adds 16 bytes at a time, and a warp 512 consecutive ones. (FlashAttention-2,
arXiv 2307.08691, accumulates its dQ in an order of its own as well.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def slab_layout(D):
    """Of [D / 8, 128, 4]: the last axis and the first are registers, the second the threads."""
    registers, step = [[0, 0, 1], [0, 0, 2]], 1
    while step < D // 8:
        registers.append([step, 0, 0])
        step *= 2
    lanes = [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]]
    warps = [[0, 32, 0], [0, 64, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [D // 8, 128, 4])


@gluon.jit
def as_slab(x):
    """An accumulator [64, D] as [D / 8, 128, 4]; no data moves.

    A row is (warp, half, lane // 4), a column (eighth, lane % 4, pair).
    """
    D: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, [4, 2, 8, D // 8, 4, 2]), (3, 0, 2, 4, 1, 5))
    return gl.convert_layout(gl.reshape(x, [D // 8, 128, 4]), slab_layout(D), assert_trivial=True)


@gluon.jit
def from_slab(x, layout: gl.constexpr):
    """The accumulator [64, D] again, in its ``layout``; no data moves."""
    D: gl.constexpr = x.shape[0] * 8
    x = gl.permute(gl.reshape(x, [D // 8, 4, 8, 4, 2, 2]), (1, 4, 2, 0, 3, 5))
    return gl.convert_layout(gl.reshape(x, [64, D]), layout, assert_trivial=True)


@gluon.jit
def slab_offsets(D: gl.constexpr):
    """[D / 8, 128, 4]: where each element of a slab is, from the slab's first."""
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
    SLABS_A_TILE: tl.constexpr,
    D: tl.constexpr,
    HAS_UNIT: tl.constexpr,
):
    """64 columns of one head: the sum over its copies, each element back where it belongs."""
    slab = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    r = tl.arange(0, 64)[:, None]
    c = tl.arange(0, D)[None, :]
    thread = r // 16 * 32 + r % 8 * 4 + c % 8 // 2
    place = c // 8 * 512 + thread * 4 + r % 16 // 8 * 2 + c % 2
    total = tl.zeros([64, D], tl.float32)
    for copy in range(COPIES):
        at = head * COPIES + copy
        # what no block of rows has visited was never written
        visits = tl.load(turns + at * tiles + slab // SLABS_A_TILE)
        slabs = buffer + (at * tiles * SLABS_A_TILE + slab) * (64 * D)
        total += tl.load(slabs + place, mask=visits > 0, other=0.0)
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
    """The columns' gradient [b, heads, m, d] of the buffers that the blocks of rows added to.

    Args:
        buffer: fp32 [b, heads * copies, tiles * columns, d], in slabs; copies are added up.
        turns: int32 [b, heads * copies, tiles]: how many blocks have added to a tile.
        cols: [b, heads, m, d], what the gradient is of.
        unit: a further factor, on the device.
    """
    b, heads, m, d = cols.shape
    tiles = turns.shape[2]
    out = torch.empty(b, heads, m, d, dtype=dtype, device=buffer.device)
    with torch.cuda.device_of(buffer):
        _columns_kernel[(triton.cdiv(m, 64), b * heads)](
            buffer,
            turns,
            buffer if unit is None else unit,
            out,
            m,
            tiles,
            scale,
            COPIES=buffer.shape[1] // heads,
            SLABS_A_TILE=buffer.shape[2] // tiles // 64,
            D=d,
            HAS_UNIT=unit is not None,
        )
    return out
