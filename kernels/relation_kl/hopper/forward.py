"""Warp-specialized forward of the relation KL for Hopper (Gluon).

It computes the same sums as ``triton.forward``. A program works for a block of 64 rows per row
warpgroup. A producer warp copies the column tiles ahead into a ring of shared-memory stages; which
tiles, and in which order, is in ``scheduler``. Each row warpgroup multiplies S = X_s Y_s^T and
T = X_t Y_t^T on the tensor cores. It takes the exponentials of S while its T is multiplied, and the
exponentials of T while other warpgroups multiply (FlashAttention-3, arXiv 2407.08608, overlaps in
the same two ways). The hardware decides which warpgroup multiplies when: enforcing turns with
barriers was measured to be slower.

Time runs to the right. The drawing has two row warpgroups and three stages; a box is work on the
tile of that step, an arrow is a barrier:

    producer warp    [tile 0][tile 1][tile 2]   [tile 3]
                            |                   ^
                            | cols_s_ready,     | cols_free, after T 0 of both
                            v cols_t_ready      |
    row warpgroup 0          [S 0][T 0    ][exp T 0][S 1][T 1    ][exp T 1 ...
                                  [exp S 0]              [exp S 1]
    row warpgroup 1               [S 0][T 0    ][exp T 0][S 1][T 1    ][exp T 1 ...
                                       [exp S 0]              [exp S 1]

Two barriers are not drawn. The row warpgroups wait for ``rows_ready`` before their first product.
All partitions wait for ``attempt_done`` after their last tile, to learn whether the tiles are swept
once more (``_consume``).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..operands import Operands
from ..statistics import Partials, RelationStatistics
from ..triton.tiles import LN2, LOG2E, Interval, Pair, TileSpan, section_heads
from .forward_tile import HIDDEN, Barriers, Buffers, add_edge_tile, add_tile
from .scheduler import exact_steps, forward_plan, forward_tile
from .softmax import LaneSums, quad_layout, share_maximum
from .tiles import (
    STEP_COLUMNS,
    WARPGROUP_ROWS,
    Descriptors,
    Place,
    block_of_program,
    load_row_intervals,
    partition_barrier,
    tma_descriptor,
)

# A sweep with fixed shifts is invalid if one of its sums reaches this number, see ``_consume``.
SUM_LIMIT: gl.constexpr = gl.constexpr(2.0**60)
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


@dataclass(frozen=True)
class ProgramShape:
    """How a program divides a multiprocessor, for one head_dim.

    Attributes:
        row_warpgroups: Number of row warpgroups, of 64 rows each.
        stages: Number of column tiles in shared memory.
        launch_registers: Registers per thread at launch.
        row_registers: Registers per thread of a row warpgroup, after the producer gave most of its
            registers away.
    """

    row_warpgroups: int
    stages: int
    launch_registers: int
    row_registers: int


# The warpgroups of a multiprocessor hide each other's latencies. For head_dim 128 one program with
# three row warpgroups fits; for 64 two programs fit, and one starts while the other is busy.
SHAPE_OF_HEAD_DIM = {64: ProgramShape(2, 4, 80, 104), 128: ProgramShape(3, 3, 128, 160)}


class Sizes(NamedTuple):
    """Number of rows per head, and number of elements in one plane [b, heads, n] of the output."""

    n: gl.tensor
    plane: gl.tensor


class Program(NamedTuple):
    """The values that all row warpgroups of one program need.

    Attributes:
        visible: ``Interval`` of pointers to [n]: the columns that each row of the sequence sees.
        out: Pointer to the head's first row in the first plane of the output.
        span: ``TileSpan`` of the block.
        scale: ``Pair`` of factors of the products; they carry log2(e).
    """

    buffers: Buffers
    barriers: Barriers
    visible: Interval
    out: gl.tensor
    place: Place
    span: TileSpan
    sizes: Sizes
    scale: Pair


@gluon.jit
def _next_attempt(attempt, failed, done, WARPS: gl.constexpr):
    """Wait until all row warpgroups finish an attempt; return the next one, or 2 if there is none.

    Args:
        attempt: The attempt to wait for, 0 or 1.
        failed: ``Buffers.failed``.
        done: ``Barriers.attempt_done``.
        WARPS: Number of warps of the partition that calls.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    WARPGROUPS: gl.constexpr = failed.shape[0] // 2
    mbarrier.wait(done, attempt)
    flag = failed.index(attempt * WARPGROUPS).load(layout)
    for warpgroup in gl.static_range(1, WARPGROUPS):
        flag = gl.maximum(flag, failed.index(attempt * WARPGROUPS + warpgroup).load(layout))
    return gl.where(gl.max(flag, 0) > 0, attempt + 1, 2)


@gluon.jit
def _produce(descriptors, buffers, barriers, place, span, STAGES: gl.constexpr):
    """Copy the block's rows, then tile after tile as the row warpgroups free the stages."""
    rows_s, rows_t = descriptors.rows_s, descriptors.rows_t
    cols_s, cols_t = descriptors.cols_s, descriptors.cols_t
    TILE_COLUMNS: gl.constexpr = cols_s.block_shape[2]
    WARPGROUPS: gl.constexpr = buffers.rows_s.shape[0]

    ready = barriers.rows_ready
    mbarrier.expect(ready, WARPGROUPS * (rows_s.block_type.nbytes + rows_t.block_type.nbytes))
    for warpgroup in gl.static_range(WARPGROUPS):
        at = [place.batch, place.row_head, place.row_start + warpgroup * WARPGROUP_ROWS, 0]
        tma.async_copy_global_to_shared(rows_s, at, ready, buffers.rows_s.index(warpgroup))
        tma.async_copy_global_to_shared(rows_t, at, ready, buffers.rows_t.index(warpgroup))
    total = span.end - span.start
    attempt = 0
    while attempt < 2:
        for step in range(total):
            copied = attempt * total + step
            stage = copied % STAGES
            start = forward_tile(step, span) * TILE_COLUMNS
            at = [place.batch, place.col_head, start, 0]
            mbarrier.wait(barriers.cols_free.index(stage), (copied // STAGES & 1) ^ 1)
            ready = barriers.cols_s_ready.index(stage)
            mbarrier.expect(ready, cols_s.block_type.nbytes)
            tma.async_copy_global_to_shared(cols_s, at, ready, buffers.cols_s.index(stage))
            ready = barriers.cols_t_ready.index(stage)
            mbarrier.expect(ready, cols_t.block_type.nbytes)
            tma.async_copy_global_to_shared(cols_t, at, ready, buffers.cols_t.index(stage))
        attempt = _next_attempt(attempt, buffers.failed, barriers.attempt_done, 1)


@gluon.jit
def _consume(
    program,
    WARPGROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """Sweep the tiles for one warpgroup's 64 rows, merge the lanes, write the statistics.

    The first tiles of every row are added exactly, with running maxima. Afterwards the shift of
    each row stays at the maximum so far: fp32 sums of 2^v are as precise with v up to 60 as with v
    up to 0, so taking further maxima would be wasted work. A score that exceeds the shift by more
    makes a sum exceed SUM_LIMIT. If that happens in any warpgroup, the block is swept once more,
    exactly throughout, and the first results are overwritten.
    """
    buffers, barriers = program.buffers, program.barriers
    span, sizes, scale = program.span, program.sizes, program.scale
    WARPGROUPS: gl.constexpr = buffers.rows_s.shape[0]
    TILE_COLUMNS: gl.constexpr = buffers.cols_s.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_COLUMNS, 16])
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, quad_layout(TILE_COLUMNS)))

    row_start = program.place.row_start + WARPGROUP * WARPGROUP_ROWS
    i = row_start + gl.arange(0, WARPGROUP_ROWS, gl.SliceLayout(1, mma))
    allowed = load_row_intervals(program.visible, i, sizes.n)
    visible_columns, exact = exact_steps(allowed, span, TILE_COLUMNS)
    i = row_start + gl.arange(0, WARPGROUP_ROWS, gl.SliceLayout(1, lanes))
    inside = i < sizes.n
    out = program.out + i
    mbarrier.wait(barriers.rows_ready, 0)
    total = span.end - span.start
    edges = total - (span.full_end - span.full_start)
    attempt = 0
    while attempt < 2:
        copied = attempt * total
        lowest = gl.full([WARPGROUP_ROWS, 4], HIDDEN, gl.float32, lanes)
        zero = gl.zeros([WARPGROUP_ROWS, 4], gl.float32, lanes)
        sums = LaneSums(lowest, zero, lowest, zero, zero)
        for step in range(exact):
            start = forward_tile(step, span) * TILE_COLUMNS
            sums = add_edge_tile(
                sums, buffers, barriers, allowed, visible_columns, start, copied + step, scale,
                Pair(zero, zero), WARPGROUP, STAGES, EXACT=True,
            )  # fmt: skip
        m_s, l_s, m_t, l_t, a = sums
        m_s, shrink_s = share_maximum(m_s, scale.s)
        m_t, shrink_t = share_maximum(m_t, scale.t)
        shift_s = m_s * scale.s
        shift_t = m_t * scale.t
        l_s = l_s * shrink_s
        l_t = l_t * shrink_t
        # From here on a is sum 2^v_t (v_t - v_s); the gap of the shifts is added at the end.
        a = a * shrink_t - l_t * (shift_t - shift_s)
        shift = Pair(shift_s, shift_t)
        sums = LaneSums(m_s, l_s, m_t, l_t, a)
        for step in range(exact, edges):
            start = forward_tile(step, span) * TILE_COLUMNS
            sums = add_edge_tile(
                sums, buffers, barriers, allowed, visible_columns, start, copied + step, scale,
                shift, WARPGROUP, STAGES, EXACT=False,
            )  # fmt: skip
        for step in range(gl.maximum(exact, edges), total):
            sums = add_tile(
                sums, buffers, barriers, allowed, 0, copied + step, scale, shift,
                WARPGROUP, STAGES, MASKED=False, EXACT=False,
            )  # fmt: skip
        m_s, l_s, m_t, l_t, a = sums
        top_s = gl.max(m_s, 1)
        top_t = gl.max(m_t, 1)
        l_s = gl.sum(l_s, 1)
        l_t = gl.sum(l_t, 1)
        a = gl.sum(a, 1) + l_t * (top_t * scale.t - top_s * scale.s)
        nonempty = top_t > HIDDEN * 0.5
        in_range = (l_s < SUM_LIMIT) & (l_t < SUM_LIMIT)
        failed = gl.max((nonempty & ~in_range).to(gl.int32), 0)
        flag = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0])) + failed
        buffers.failed.index(attempt * WARPGROUPS + WARPGROUP).store(flag)
        partition_barrier()
        mbarrier.arrive(barriers.attempt_done)
        plane = sizes.plane
        if PARTIAL:
            gl.store(out, gl.where(nonempty, top_s * (scale.s * LN2), float("-inf")), mask=inside)
            gl.store(out + plane, gl.where(nonempty, l_s, 0.0), mask=inside)
            gl.store(
                out + 2 * plane, gl.where(nonempty, top_t * (scale.t * LN2), float("-inf")), inside
            )
            gl.store(out + 3 * plane, gl.where(nonempty, l_t, 0.0), mask=inside)
            gl.store(out + 4 * plane, gl.where(nonempty, a * LN2, 0.0), mask=inside)
        else:
            lse_s = top_s * scale.s + gl.log2(l_s)
            lse_t = top_t * scale.t + gl.log2(l_t)
            kl = gl.where(nonempty, a / l_t + (lse_s - lse_t), 0.0)
            gl.store(out, gl.where(nonempty, lse_s * LN2, float("-inf")), mask=inside)
            gl.store(out + plane, gl.where(nonempty, lse_t * LN2, float("-inf")), mask=inside)
            gl.store(out + 2 * plane, kl * LN2, mask=inside)
        attempt = _next_attempt(attempt, buffers.failed, barriers.attempt_done, 4)
        exact = total


@gluon.jit(do_not_specialize=["b", "heads", "n", "section"])
def _forward_kernel(
    rows_s,
    rows_t,
    cols_s,
    cols_t,
    visible,
    plan,
    out,
    b,
    heads,
    group,
    n,
    section,
    scale,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """Write the sums or statistics of WARPGROUPS * 64 rows of one head.

    Args:
        rows_s, rows_t: TMA descriptors of [b, heads, n, d], 64 vectors per copy.
        cols_s, cols_t: TMA descriptors of [b, heads / group, m, d], TILE_COLUMNS vectors per copy.
        visible: ``Interval`` of pointers to [b, n]: the columns that each row sees.
        plan: int32 [b, blocks, 5] of ``scheduler.forward_plan``.
        out: [5, b, heads, n] fp32, m_s, l_s, m_t, l_t, a in nats, if PARTIAL; otherwise
            [3, b, heads, n] fp32, lse_s, lse_t, kl in nats.
        section: Number of (sequence, head) pairs in one section, see ``block_of_program``.
        scale: ``Pair`` of factors of the products; they carry log2(e).
        WARPGROUPS, STAGES, REGISTERS: From ``ProgramShape``.
    """
    BLOCK_M: gl.constexpr = WARPGROUPS * WARPGROUP_ROWS
    blocks = gl.cdiv(n, BLOCK_M)
    index_in_plan, bh = block_of_program(blocks, b * heads, section, False)
    ib = bh // heads
    ih = bh % heads
    plan += (ib * blocks + index_in_plan) * 5
    row_start = gl.load(plan) * BLOCK_M
    span = TileSpan(gl.load(plan + 1), gl.load(plan + 2), gl.load(plan + 3), gl.load(plan + 4))
    col_lo = visible.lo + gl.cast(ib, gl.int64) * n
    col_hi = visible.hi + gl.cast(ib, gl.int64) * n

    rows_s_buffer = gl.allocate_shared_memory(
        rows_s.dtype, [WARPGROUPS] + rows_s.block_shape, rows_s.layout
    )
    rows_t_buffer = gl.allocate_shared_memory(
        rows_t.dtype, [WARPGROUPS] + rows_t.block_shape, rows_t.layout
    )
    cols_s_buffer = gl.allocate_shared_memory(
        cols_s.dtype, [STAGES] + cols_s.block_shape, cols_s.layout
    )
    cols_t_buffer = gl.allocate_shared_memory(
        cols_t.dtype, [STAGES] + cols_t.block_shape, cols_t.layout
    )
    barriers = Barriers(
        rows_ready=gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        cols_s_ready=gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        cols_t_ready=gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        cols_free=gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        attempt_done=gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
    )
    flag_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    failed = gl.allocate_shared_memory(gl.int32, [2 * WARPGROUPS, 128], flag_layout)
    mbarrier.init(barriers.attempt_done, WARPGROUPS)
    mbarrier.init(barriers.rows_ready, 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.cols_s_ready.index(stage), 1)
        mbarrier.init(barriers.cols_t_ready.index(stage), 1)
        mbarrier.init(barriers.cols_free.index(stage), WARPGROUPS)

    descriptors = Descriptors(rows_s, rows_t, cols_s, cols_t)
    buffers = Buffers(rows_s_buffer, rows_t_buffer, cols_s_buffer, cols_t_buffer, failed)
    place = Place(ib, ih, ih // group, row_start)
    plane = gl.cast(b * heads, gl.int64) * n
    out += gl.cast(bh, gl.int64) * n
    program = Program(
        buffers, barriers, Interval(col_lo, col_hi), out, place, span, Sizes(n, plane), scale
    )
    # Both lists of partitions are written out, because Gluon cannot compute such a list.
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (program, 0, STAGES, PARTIAL)),
                (_consume, (program, 1, STAGES, PARTIAL)),
                (_produce, (descriptors, buffers, barriers, place, span, STAGES)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (program, 0, STAGES, PARTIAL)),
                (_consume, (program, 1, STAGES, PARTIAL)),
                (_consume, (program, 2, STAGES, PARTIAL)),
                (_produce, (descriptors, buffers, barriers, place, span, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )


def hopper_forward(op: Operands, partial: bool) -> RelationStatistics | Partials:
    """Run the forward kernel, as ``triton.forward.triton_forward`` does.

    Args:
        op: Operands for which ``hopper.backend.why_not`` gives no reason.
        partial: Whether to return ``Partials`` over the given columns instead of the statistics.

    Returns:
        Tensors [b, Ha, n] fp32.
    """
    b, heads, n, d_s = op.rows_s.shape
    shape = SHAPE_OF_HEAD_DIM[max(d_s, op.rows_t.shape[3])]
    rows, columns = shape.row_warpgroups * WARPGROUP_ROWS.value, STEP_COLUMNS.value
    planes = 5 if partial else 3
    out = torch.empty(planes, b, heads, n, dtype=torch.float32, device=op.rows_s.device)
    with torch.cuda.device_of(op.rows_s):
        _forward_kernel[(-(-n // rows) * b * heads,)](
            tma_descriptor(op.rows_s, WARPGROUP_ROWS.value),
            tma_descriptor(op.rows_t, WARPGROUP_ROWS.value),
            tma_descriptor(op.cols_s, columns),
            tma_descriptor(op.cols_t, columns),
            Interval(op.mask.col_lo_bn.contiguous(), op.mask.col_hi_bn.contiguous()),
            forward_plan(op.mask, rows, columns),
            out,
            b,
            heads,
            op.group,
            n,
            section_heads(b * heads, op.cols_s, op.cols_t),
            Pair(op.scale_s * LOG2E.value, op.scale_t * LOG2E.value),
            WARPGROUPS=shape.row_warpgroups,
            STAGES=shape.stages,
            REGISTERS=shape.row_registers,
            PARTIAL=partial,
            num_warps=4,
            maxnreg=shape.launch_registers,
        )
    return Partials(*out) if partial else RelationStatistics(*out)
