"""One column tile of the Hopper forward: two products of a warpgroup, and their exponentials."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from .softmax import by_lane, spread, sum_columns, sweep_student, sweep_teacher
from .tiles import ROWS, rows_by_cols

# Scores of hidden pairs. A power of two, so that scaling it is exact and score - maximum cannot
# come out positive; finite, so that no difference of two is NaN.
HIDDEN: gl.constexpr = gl.constexpr(-(2.0**100))


@gluon.jit
def sweep_tile(
    state,
    smem,
    bars,
    lo,
    hi,
    start,
    step,
    scale_s,
    scale_t,
    shift_s,
    shift_t,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    EXACT: gl.constexpr,
):
    """One column tile: two products, and the student's exponentials under the second of them.

    MASKED hides the columns outside of [lo, hi); EXACT keeps running maxima, without it the
    exponentials are of the scores less ``shift_*``.
    """
    x_s, x_t, y_s, y_t, flags = smem
    x_ready, s_ready, t_ready, free, done = bars
    BLOCK_N: gl.constexpr = y_s.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, mma)
    stage = step % STAGES
    phase = step // STAGES & 1
    mbarrier.wait(s_ready.index(stage), phase)
    s = rows_by_cols(x_s.index(GROUP), y_s.index(stage), zero)
    mbarrier.wait(t_ready.index(stage), phase)
    t = rows_by_cols(x_t.index(GROUP), y_t.index(stage), zero)
    s = warpgroup_mma_wait(1, deps=[s])
    m_s, l_s, m_t, l_t, a = state
    if MASKED:
        j = gl.expand_dims(start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma)), 0)
        allowed = (j >= gl.expand_dims(lo, 1)) & (j < gl.expand_dims(hi, 1))
        s = gl.where(allowed, s, HIDDEN)
    if EXACT:
        s = by_lane(s, BLOCK_N)
        m_s, l_s, v_s, shift_s = sweep_student(m_s, l_s, s, scale_s)
    else:
        v_s = by_lane(s, BLOCK_N) * scale_s - spread(shift_s)
        l_s += sum_columns(gl.exp2(v_s))
    t = warpgroup_mma_wait(0, deps=[t])
    mbarrier.arrive(free.index(stage))
    if MASKED:
        t = gl.where(allowed, t, HIDDEN)
    if EXACT:
        t = by_lane(t, BLOCK_N)
        m_t, l_t, a = sweep_teacher(m_t, l_t, a, t, scale_t, v_s, shift_s)
    else:
        v_t = by_lane(t, BLOCK_N) * scale_t - spread(shift_t)
        p_t = gl.exp2(v_t)
        l_t += sum_columns(p_t)
        a += sum_columns(p_t * (v_t - v_s))
    return m_s, l_s, m_t, l_t, a


@gluon.jit
def sweep_edge(
    state,
    smem,
    bars,
    lo,
    hi,
    seen,
    start,
    step,
    scale_s,
    scale_t,
    shift_s,
    shift_t,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    EXACT: gl.constexpr,
):
    """`sweep_tile` of a tile that some rows may not see; passed over where none does.

    seen: the columns [first, last) that some row of the warpgroup sees.
    """
    first, last = seen
    BLOCK_N: gl.constexpr = smem[2].shape[3]
    if (start < last) & (start + BLOCK_N > first):
        state = sweep_tile(
            state, smem, bars, lo, hi, start, step, scale_s, scale_t, shift_s, shift_t,
            GROUP, STAGES, MASKED=True, EXACT=EXACT,
        )  # fmt: skip
    else:
        _pass_over(bars, step, STAGES)
    return state


@gluon.jit
def _pass_over(bars, step, STAGES: gl.constexpr):
    x_ready, s_ready, t_ready, free, done = bars
    stage = step % STAGES
    mbarrier.wait(s_ready.index(stage), step // STAGES & 1)
    mbarrier.wait(t_ready.index(stage), step // STAGES & 1)
    mbarrier.arrive(free.index(stage))
