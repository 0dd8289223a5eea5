"""The order in which the Hopper backward keeps the columns' gradient in device memory.

64 columns are a slab: an accumulator [64, d] in the order in which it lies in a warpgroup's
registers, as [d / 8, 128, 4]: four registers of each of 128 threads, thread after thread. So a
thread adds 16 bytes at a time, and a warp 512 consecutive ones. (FlashAttention-2,
arXiv 2307.08691, accumulates its dQ in an order of its own as well.)
"""

import torch
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


def in_order(slabs: torch.Tensor) -> torch.Tensor:
    """A buffer of slabs as [b, heads, rows, d], rows and columns where they belong."""
    b, heads, rows, d = slabs.shape
    x = slabs.view(b, heads, rows // 64, d // 8, 4, 8, 4, 2, 2)
    return x.permute(0, 1, 2, 4, 7, 5, 3, 6, 8).reshape(b, heads, rows, d)
