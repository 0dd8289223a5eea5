"""The online softmax of the Hopper forward: sums that each thread keeps over its part of a row.

An accumulator [64, TILE_COLUMNS] lies in the threads of a warpgroup as
[64, TILE_COLUMNS / 8, 4, 2]. Axis 2 is the lane inside the *quad*, the four neighboring threads
that share a row; axes 1 and 3 are registers of one thread (PTX ISA, wgmma accumulators). Sums and
maxima over axes 1 and 3 need no exchange between threads. They are [64, 4]: one number per row and
lane, which covers a quarter of the columns. The four lanes merge once, at the end, as any partials
of a row do (``statistics``).
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class LaneSums(NamedTuple):
    """The sums of each row over the columns that each lane has met, [64, 4] fp32 each.

    The meaning is the same as in ``triton.forward.RunningSums``, but m_s and m_t may lie below the
    maxima (``forward._consume``).
    """

    m_s: gl.tensor
    l_s: gl.tensor
    m_t: gl.tensor
    l_t: gl.tensor
    a: gl.tensor


@gluon.constexpr_function
def quad_layout(TILE_COLUMNS):
    """Return the layout of an accumulator seen as [64, TILE_COLUMNS / 8, 4, 2]."""
    step, registers = 1, [[0, 0, 0, 1], [8, 0, 0, 0]]
    while step < TILE_COLUMNS // 8:
        registers.append([0, step, 0, 0])
        step *= 2
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, TILE_COLUMNS // 8, 4, 2])


@gluon.jit
def expand_lanes(x):
    """Return [64, 4] as [64, 1, 4, 1], which broadcasts over the columns of each lane."""
    return gl.expand_dims(gl.expand_dims(x, 1), 3)


@gluon.jit
def split_quads(x, TILE_COLUMNS: gl.constexpr):
    """Return [64, TILE_COLUMNS] as [64, TILE_COLUMNS / 8, 4, 2] in the same registers."""
    layout: gl.constexpr = quad_layout(TILE_COLUMNS)
    return gl.convert_layout(x.reshape([64, TILE_COLUMNS // 8, 4, 2]), layout, assert_trivial=True)


@gluon.jit
def _max_columns(x):
    return gl.max(gl.max(x, 3), 1)


@gluon.jit
def sum_columns(x):
    """Sum [64, TILE_COLUMNS / 8, 4, 2] over the columns of each lane: [64, 4]."""
    return gl.sum(gl.sum(x, 3), 1)


@gluon.jit
def add_student(m, total, s, scale):
    """Add the student's exponentials of a tile with a running maximum.

    Args:
        m, total: m_s and l_s so far, [64, 4].
        s: Unscaled products, split into quads.
        scale: Factor of the products; it carries log2(e).

    Returns:
        (m_s, l_s, v, shift): v = s * scale - shift per pair, shift = m_s * scale per lane.
    """
    top = gl.maximum(m, _max_columns(s))
    shift = top * scale
    v = s * scale - expand_lanes(shift)
    total = total * gl.exp2(m * scale - shift) + sum_columns(gl.exp2(v))
    return top, total, v, shift


@gluon.jit
def add_teacher(m, total, a, t, scale, v_s, shift_s):
    """Add the teacher's exponentials of a tile with a running maximum, and the KL's sum.

    Args:
        m, total, a: m_t, l_t and a so far, [64, 4].
        t: Unscaled products, split into quads.
        scale: Factor of the products; it carries log2(e).
        v_s, shift_s: From ``add_student`` of the same tile.

    Returns:
        (m_t, l_t, a). T - S is v - v_s plus the difference of the shifts.
    """
    top = gl.maximum(m, _max_columns(t))
    shift = top * scale
    v = t * scale - expand_lanes(shift)
    p = gl.exp2(v)
    shrink = gl.exp2(m * scale - shift)
    sum_t = sum_columns(p)
    total = total * shrink + sum_t
    a = a * shrink + (sum_columns(p * (v - v_s)) + sum_t * (shift - shift_s))
    return top, total, a


@gluon.jit
def share_maximum(m, scale):
    """Return the maximum over the four lanes of each row, and the factor that takes sums to it."""
    top = gl.expand_dims(gl.max(m, 1), 1) + gl.zeros_like(m)
    return top, gl.exp2((m - top) * scale)
