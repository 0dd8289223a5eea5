"""One tile of the Hopper forward: two products of a warpgroup, and their exponentials."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from .softmax import LaneSums, add_student, add_teacher, expand_lanes, split_quads, sum_columns
from .tiles import WARPGROUP_ROWS, issue_scores

# The product of a pair that is not allowed. It is a power of two, so that scaling it is exact and
# score - maximum cannot come out positive. It is finite, so that no difference of two is NaN.
HIDDEN: gl.constexpr = gl.constexpr(-(2.0**100))


class Buffers(NamedTuple):
    """Shared memory of a program.

    Attributes:
        rows_s, rows_t: [row_warpgroups, 1, 1, 64, d], the block's rows.
        cols_s, cols_t: [stages, 1, 1, TILE_COLUMNS, d], a ring of column tiles.
        failed: int32 [2 * row_warpgroups, 128], index attempt * row_warpgroups + warpgroup: nonzero
            if the attempt of the warpgroup failed. All 128 numbers are equal.
    """

    rows_s: gl.shared_memory_descriptor
    rows_t: gl.shared_memory_descriptor
    cols_s: gl.shared_memory_descriptor
    cols_t: gl.shared_memory_descriptor
    failed: gl.shared_memory_descriptor


class Barriers(NamedTuple):
    """The barriers of a program.

    Attributes:
        rows_ready: One barrier. The copy engine arrives when the block's rows are there.
        cols_s_ready, cols_t_ready: [stages, 1]. The copy engine arrives when the student's or the
            teacher's tile of a stage is there.
        cols_free: [stages, 1]. Every row warpgroup arrives when it does not need a stage any more.
        attempt_done: One barrier. Every row warpgroup arrives when its ``failed`` is written.
    """

    rows_ready: gl.shared_memory_descriptor
    cols_s_ready: gl.shared_memory_descriptor
    cols_t_ready: gl.shared_memory_descriptor
    cols_free: gl.shared_memory_descriptor
    attempt_done: gl.shared_memory_descriptor


@gluon.jit
def add_tile(
    sums,
    buffers,
    barriers,
    allowed,
    start,
    step,
    scale,
    shift,
    WARPGROUP: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    EXACT: gl.constexpr,
):
    """Return the ``LaneSums`` of one warpgroup's rows with one tile added.

    The student's exponentials are taken while the tensor cores multiply the teacher's vectors.

    Args:
        sums: ``LaneSums`` so far.
        buffers, barriers: ``Buffers`` and ``Barriers`` of the program.
        allowed: ``Interval`` of the columns that each row sees; used if MASKED.
        start: First column of the tile; used if MASKED.
        step: Number of tiles that the producer copied before this one.
        scale: ``Pair`` of factors of the products; they carry log2(e).
        shift: ``Pair`` of [64, 4], subtracted from the scaled products before the exponential; used
            without EXACT.
        WARPGROUP: Index of the warpgroup in its block.
        STAGES: Number of tiles in shared memory.
        MASKED: Whether the tile may hold pairs that are not allowed.
        EXACT: Whether to keep running maxima. Without it maxima and shifts stay as they are.
    """
    TILE_COLUMNS: gl.constexpr = buffers.cols_s.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_COLUMNS, 16])
    zero = gl.zeros([WARPGROUP_ROWS, TILE_COLUMNS], gl.float32, mma)
    stage = step % STAGES
    phase = step // STAGES & 1
    mbarrier.wait(barriers.cols_s_ready.index(stage), phase)
    s = issue_scores(buffers.rows_s.index(WARPGROUP), buffers.cols_s.index(stage), zero)
    mbarrier.wait(barriers.cols_t_ready.index(stage), phase)
    t = issue_scores(buffers.rows_t.index(WARPGROUP), buffers.cols_t.index(stage), zero)
    s = warpgroup_mma_wait(1, deps=[s])
    m_s, l_s, m_t, l_t, a = sums
    if MASKED:
        j = gl.expand_dims(start + gl.arange(0, TILE_COLUMNS, gl.SliceLayout(0, mma)), 0)
        pairs = (j >= gl.expand_dims(allowed.lo, 1)) & (j < gl.expand_dims(allowed.hi, 1))
        s = gl.where(pairs, s, HIDDEN)
    if EXACT:
        s = split_quads(s, TILE_COLUMNS)
        m_s, l_s, v_s, shift_s = add_student(m_s, l_s, s, scale.s)
    else:
        v_s = split_quads(s, TILE_COLUMNS) * scale.s - expand_lanes(shift.s)
        l_s += sum_columns(gl.exp2(v_s))
    t = warpgroup_mma_wait(0, deps=[t])
    mbarrier.arrive(barriers.cols_free.index(stage))
    if MASKED:
        t = gl.where(pairs, t, HIDDEN)
    if EXACT:
        t = split_quads(t, TILE_COLUMNS)
        m_t, l_t, a = add_teacher(m_t, l_t, a, t, scale.t, v_s, shift_s)
    else:
        v_t = split_quads(t, TILE_COLUMNS) * scale.t - expand_lanes(shift.t)
        p_t = gl.exp2(v_t)
        l_t += sum_columns(p_t)
        a += sum_columns(p_t * (v_t - v_s))
    return LaneSums(m_s, l_s, m_t, l_t, a)


@gluon.jit
def add_edge_tile(
    sums,
    buffers,
    barriers,
    allowed,
    visible,
    start,
    step,
    scale,
    shift,
    WARPGROUP: gl.constexpr,
    STAGES: gl.constexpr,
    EXACT: gl.constexpr,
):
    """Return ``add_tile`` of an edge tile, or ``sums`` if no row of the warpgroup sees the tile.

    Args:
        visible: ``Interval`` that spans the columns of all rows of the warpgroup.

    The other arguments are the same as in ``add_tile``.
    """
    TILE_COLUMNS: gl.constexpr = buffers.cols_s.shape[3]
    if (start < visible.hi) & (start + TILE_COLUMNS > visible.lo):
        sums = add_tile(
            sums, buffers, barriers, allowed, start, step, scale, shift,
            WARPGROUP, STAGES, MASKED=True, EXACT=EXACT,
        )  # fmt: skip
    else:
        _skip_tile(barriers, step, STAGES)
    return sums


@gluon.jit
def _skip_tile(barriers, step, STAGES: gl.constexpr):
    """Wait for a tile and free its stage, so that the barriers count as for a tile in use."""
    stage = step % STAGES
    mbarrier.wait(barriers.cols_s_ready.index(stage), step // STAGES & 1)
    mbarrier.wait(barriers.cols_t_ready.index(stage), step // STAGES & 1)
    mbarrier.arrive(barriers.cols_free.index(stage))
