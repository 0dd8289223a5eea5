"""The Hopper forward's sums, kept by each thread over its own columns of a row.

An accumulator [64, BLOCK_N] lies in the threads of a warpgroup as [64, BLOCK_N / 8, 4, 2]: axis 2
is the lane of the quad that shares a row, axes 1 and 3 are registers of one thread. Sums and
maxima over the registers alone need no exchange; they are [64, 4].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def quad_layout(BLOCK_N):
    """The accumulator layout of [64, BLOCK_N] seen as [64, BLOCK_N / 8, 4, 2].

    Axis 2 is the lane of the quad that shares a row; axes 1 and 3 are registers of one thread.
    """
    step, registers = 1, [[0, 0, 0, 1], [8, 0, 0, 0]]
    while step < BLOCK_N // 8:
        registers.append([0, step, 0, 0])
        step *= 2
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, BLOCK_N // 8, 4, 2])


@gluon.jit
def spread(x):
    """[64, 4] -> [64, 1, 4, 1]"""
    return gl.expand_dims(gl.expand_dims(x, 1), 3)


@gluon.jit
def by_lane(x, BLOCK_N: gl.constexpr):
    """[64, BLOCK_N] -> [64, BLOCK_N / 8, 4, 2], the same registers."""
    layout: gl.constexpr = quad_layout(BLOCK_N)
    return gl.convert_layout(x.reshape([64, BLOCK_N // 8, 4, 2]), layout, assert_trivial=True)


@gluon.jit
def _top(x):
    return gl.max(gl.max(x, 3), 1)


@gluon.jit
def sum_columns(x):
    return gl.sum(gl.sum(x, 3), 1)


@gluon.jit
def sweep_student(m, total, s, scale):
    """Add raw products s to a thread's sum; returns also v = scaled s - shift."""
    top = gl.maximum(m, _top(s))
    shift = top * scale
    v = s * scale - spread(shift)
    total = total * gl.exp2(m * scale - shift) + sum_columns(gl.exp2(v))
    return top, total, v, shift


@gluon.jit
def sweep_teacher(m, total, a, t, scale, v_s, shift_s):
    """Add raw products t to a thread's sums.

    ``a`` is in units of log2: sum 2^v_t (v_t - v_s) plus the gap of the maxima, as in `forward`.
    """
    top = gl.maximum(m, _top(t))
    shift = top * scale
    v = t * scale - spread(shift)
    p = gl.exp2(v)
    shrink = gl.exp2(m * scale - shift)
    sum_t = sum_columns(p)
    total = total * shrink + sum_t
    a = a * shrink + (sum_columns(p * (v - v_s)) + sum_t * (shift - shift_s))
    return top, total, a


@gluon.jit
def share_maximum(m, scale):
    """The maximum over the four lanes of a row, and each lane's factor towards it."""
    top = gl.expand_dims(gl.max(m, 1), 1) + gl.zeros_like(m)
    return top, gl.exp2((m - top) * scale)
