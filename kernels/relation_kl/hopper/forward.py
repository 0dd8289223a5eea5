"""Warp-specialised forward of the relation KL for Hopper (Gluon): the same sums as `forward`.

A block of 64 rows per consumer warpgroup meets the column tiles that a producer warp copies ahead
(TMA); `hopper_plan` says which. A warpgroup multiplies S = X_s Y_s^T and T = X_t Y_t^T on the
tensor cores, takes the exponentials of S under the product T, and those of T under the products of
the other warpgroups (FlashAttention-3, arXiv 2407.08608, overlaps in the same two ways). That they
take turns is left to the hardware: enforcing it with barriers measured slower.

The online softmax is kept per thread: each of the four lanes that share a row has a maximum and
sums over its own quarter of the columns, and the four merge once, at the end, as any partials do.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..operands import Operands
from ..statistics import Partials, RelationStatistics
from ..triton import tiles as tiling
from .forward_tile import HIDDEN, sweep_edge, sweep_tile
from .scheduler_plan import block_plan, tile_of_step
from .softmax import quad_layout, share_maximum
from .tiles import FAR, ROWS, descriptor, own_block, thread_barrier

LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
# A sum of exponentials from which on a sweep with a fixed shift does not count, see `_consume`.
LIMIT: gl.constexpr = gl.constexpr(2.0**60)
BLOCK_COLUMNS = 64
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


@dataclass(frozen=True)
class Blocks:
    """How a multiprocessor is divided for one head_dim.

    Attributes:
        groups: consumer warpgroups of a block, of 64 rows each.
        stages: column tiles in shared memory.
        entry_registers: of each thread at first; the producer hands most of its own on.
        registers: of a consumer's thread.
    """

    groups: int
    stages: int
    entry_registers: int
    registers: int


# The warpgroups of a multiprocessor hide each other's latencies. Three in one block is what fits
# for head_dim 128; for 64 two blocks do, and one begins while the other is busy.
BLOCKS_OF_HEAD_DIM = {64: Blocks(2, 4, 80, 104), 128: Blocks(3, 3, 128, 160)}


@gluon.jit
def _next_attempt(attempt, flags, done, WARPS: gl.constexpr):
    """2, or 1 if a warpgroup's first sweep failed; waits for all of them."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    GROUPS: gl.constexpr = flags.shape[0] // 2
    mbarrier.wait(done, attempt)
    flag = flags.index(attempt * GROUPS).load(layout)
    for group in gl.static_range(1, GROUPS):
        flag = gl.maximum(flag, flags.index(attempt * GROUPS + group).load(layout))
    return gl.where(gl.max(flag, 0) > 0, attempt + 1, 2)


@gluon.jit
def _produce(descs, smem, bars, place, span, STAGES: gl.constexpr):
    """Copy the block's own vectors, then tile after tile as the consumers free the stages."""
    rows_s, rows_t, cols_s, cols_t = descs
    x_s, x_t, y_s, y_t, flags = smem
    x_ready, s_ready, t_ready, free, done = bars
    ib, ih, ih_cols, start_m = place
    first, full_first, full_last, last = span
    BLOCK_N: gl.constexpr = cols_s.block_shape[2]
    GROUPS: gl.constexpr = x_s.shape[0]

    mbarrier.expect(x_ready, GROUPS * (rows_s.block_type.nbytes + rows_t.block_type.nbytes))
    for group in gl.static_range(GROUPS):
        start = start_m + group * ROWS
        tma.async_copy_global_to_shared(rows_s, [ib, ih, start, 0], x_ready, x_s.index(group))
        tma.async_copy_global_to_shared(rows_t, [ib, ih, start, 0], x_ready, x_t.index(group))
    total = last - first
    attempt = 0
    while attempt < 2:
        for step in range(total):
            copied = attempt * total + step
            stage = copied % STAGES
            start = tile_of_step(step, span) * BLOCK_N
            mbarrier.wait(free.index(stage), (copied // STAGES & 1) ^ 1)
            ready = s_ready.index(stage)
            mbarrier.expect(ready, cols_s.block_type.nbytes)
            tma.async_copy_global_to_shared(
                cols_s, [ib, ih_cols, start, 0], ready, y_s.index(stage)
            )
            ready = t_ready.index(stage)
            mbarrier.expect(ready, cols_t.block_type.nbytes)
            tma.async_copy_global_to_shared(
                cols_t, [ib, ih_cols, start, 0], ready, y_t.index(stage)
            )
        attempt = _next_attempt(attempt, flags, done, 1)


@gluon.jit
def _seen(lo, hi, span, BLOCK_N: gl.constexpr):
    """Of the rows of a warpgroup: the columns [first, last) that some see, and after how many
    steps each of them that sees any has met a tile that it sees, and one more has followed."""
    first, full_first, full_last, last = span
    live = lo < hi
    seen_first = gl.min(gl.where(live, lo, FAR), 0)
    seen_last = gl.max(gl.where(live, hi, 0), 0)
    lowest = (gl.min(gl.where(live, hi, FAR), 0) - 1) // BLOCK_N
    edges = last - first - (full_last - full_first)
    in_edges = (lowest >= full_last) | (full_first == full_last)
    met = gl.where(in_edges, gl.maximum(last - lowest, 0), edges)
    return (seen_first, seen_last), gl.minimum(met + 1, last - first)


@gluon.jit
def _consume(
    common,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """One warpgroup's 64 rows: sweep the tiles, merge the lanes, write the statistics.

    The first tiles of every row are swept exactly, with running maxima. For the others each row's
    shift stays at the maximum found there: fp32 sums of 2^v are as precise with v up to 60 as with
    v up to 0, so maxima would be taken for nothing. Scores that leave the shift by more show up in
    the sums (LIMIT); then the block is swept again, exactly.
    """
    smem, bars, intervals, out, place, span, sizes, scales = common
    x_ready, s_ready, t_ready, free, done = bars
    col_lo, col_hi = intervals
    scale_s, scale_t = scales
    n, plane = sizes
    first, full_first, full_last, last = span
    y_s = smem[2]
    flags = smem[4]
    GROUPS: gl.constexpr = smem[0].shape[0]
    BLOCK_N: gl.constexpr = y_s.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, quad_layout(BLOCK_N)))

    i = place[3] + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    lo = gl.load(col_lo + i, mask=i < n, other=0)
    hi = gl.load(col_hi + i, mask=i < n, other=0)
    seen, exact = _seen(lo, hi, span, BLOCK_N)
    i = place[3] + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, lanes))
    inside = i < n
    out += i
    mbarrier.wait(x_ready, 0)
    total = last - first
    edges = total - (full_last - full_first)
    attempt = 0
    while attempt < 2:
        base = attempt * total
        low = gl.full([ROWS, 4], HIDDEN, gl.float32, lanes)
        nil = gl.zeros([ROWS, 4], gl.float32, lanes)
        state = (low, nil, low, nil, nil)
        for step in range(exact):
            start = tile_of_step(step, span) * BLOCK_N
            state = sweep_edge(
                state, smem, bars, lo, hi, seen, start, base + step, scale_s, scale_t, nil, nil,
                GROUP, STAGES, EXACT=True,
            )  # fmt: skip
        m_s, l_s, m_t, l_t, a = state
        m_s, shrink_s = share_maximum(m_s, scale_s)
        m_t, shrink_t = share_maximum(m_t, scale_t)
        shift_s = m_s * scale_s
        shift_t = m_t * scale_t
        l_s = l_s * shrink_s
        l_t = l_t * shrink_t
        a = a * shrink_t - l_t * (shift_t - shift_s)
        state = (m_s, l_s, m_t, l_t, a)
        for step in range(exact, edges):
            start = tile_of_step(step, span) * BLOCK_N
            state = sweep_edge(
                state, smem, bars, lo, hi, seen, start, base + step, scale_s, scale_t, shift_s,
                shift_t, GROUP, STAGES, EXACT=False,
            )  # fmt: skip
        for step in range(gl.maximum(exact, edges), total):
            state = sweep_tile(
                state, smem, bars, lo, hi, 0, base + step, scale_s, scale_t, shift_s, shift_t,
                GROUP, STAGES, MASKED=False, EXACT=False,
            )  # fmt: skip
        m_s, l_s, m_t, l_t, a = state
        top_s = gl.max(m_s, 1)
        top_t = gl.max(m_t, 1)
        l_s = gl.sum(l_s, 1)
        l_t = gl.sum(l_t, 1)
        a = gl.sum(a, 1) + l_t * (top_t * scale_t - top_s * scale_s)
        live = top_t > HIDDEN * 0.5
        failed = gl.max((live & ~((l_s < LIMIT) & (l_t < LIMIT))).to(gl.int32), 0)
        flag = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0])) + failed
        flags.index(attempt * GROUPS + GROUP).store(flag)
        thread_barrier()
        mbarrier.arrive(done)
        if PARTIAL:
            gl.store(out, gl.where(live, top_s * (scale_s * LN2), float("-inf")), mask=inside)
            gl.store(out + plane, gl.where(live, l_s, 0.0), mask=inside)
            gl.store(
                out + 2 * plane, gl.where(live, top_t * (scale_t * LN2), float("-inf")), mask=inside
            )
            gl.store(out + 3 * plane, gl.where(live, l_t, 0.0), mask=inside)
            gl.store(out + 4 * plane, gl.where(live, a * LN2, 0.0), mask=inside)
        else:
            lse_s = top_s * scale_s + gl.log2(l_s)
            lse_t = top_t * scale_t + gl.log2(l_t)
            kl = gl.where(live, a / l_t + (lse_s - lse_t), 0.0)
            gl.store(out, gl.where(live, lse_s * LN2, float("-inf")), mask=inside)
            gl.store(out + plane, gl.where(live, lse_t * LN2, float("-inf")), mask=inside)
            gl.store(out + 2 * plane, kl * LN2, mask=inside)
        attempt = _next_attempt(attempt, flags, done, 4)
        exact = total


@gluon.jit(do_not_specialize=["b", "heads", "n", "section"])
def _forward_kernel(
    rows_s,
    rows_t,
    cols_s,
    cols_t,
    col_lo,
    col_hi,
    plan,
    out,
    b,
    heads,
    group,
    n,
    section,
    scale_s,
    scale_t,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """GROUPS * 64 rows of one head. ``scale_*`` carry log2(e); ``out`` is [5 or 3, b, heads, n].

    rows_*, cols_*: TMA descriptors of [b, heads, length, d] with blocks of 64 and BLOCK_N vectors.
    plan: of `hopper_plan.block_plan`.
    """
    BLOCK_M: gl.constexpr = GROUPS * ROWS
    blocks = gl.cdiv(n, BLOCK_M)
    place_in_plan, bh = own_block(blocks, b * heads, section, False)
    ib = bh // heads
    ih = bh % heads
    plan += (ib * blocks + place_in_plan) * 5
    start_m = gl.load(plan) * BLOCK_M
    span = (gl.load(plan + 1), gl.load(plan + 2), gl.load(plan + 3), gl.load(plan + 4))
    col_lo += gl.cast(ib, gl.int64) * n
    col_hi += gl.cast(ib, gl.int64) * n

    x_s = gl.allocate_shared_memory(rows_s.dtype, [GROUPS] + rows_s.block_shape, rows_s.layout)
    x_t = gl.allocate_shared_memory(rows_t.dtype, [GROUPS] + rows_t.block_shape, rows_t.layout)
    y_s = gl.allocate_shared_memory(cols_s.dtype, [STAGES] + cols_s.block_shape, cols_s.layout)
    y_t = gl.allocate_shared_memory(cols_t.dtype, [STAGES] + cols_t.block_shape, cols_t.layout)
    x_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    s_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    t_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    flag_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    flags = gl.allocate_shared_memory(gl.int32, [2 * GROUPS, 128], flag_layout)
    mbarrier.init(done, GROUPS)
    mbarrier.init(x_ready, 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(s_ready.index(stage), 1)
        mbarrier.init(t_ready.index(stage), 1)
        mbarrier.init(free.index(stage), GROUPS)

    descs = (rows_s, rows_t, cols_s, cols_t)
    smem = (x_s, x_t, y_s, y_t, flags)
    bars = (x_ready, s_ready, t_ready, free, done)
    intervals = (col_lo, col_hi)
    place = (ib, ih, ih // group, start_m)
    plane = gl.cast(b * heads, gl.int64) * n
    sizes = (n, plane)
    scales = (scale_s, scale_t)
    out += gl.cast(bh, gl.int64) * n
    common = (smem, bars, intervals, out, place, span, sizes, scales)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (common, 0, STAGES, PARTIAL)),
                (_consume, (common, 1, STAGES, PARTIAL)),
                (_produce, (descs, smem, bars, place, span, STAGES)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (common, 0, STAGES, PARTIAL)),
                (_consume, (common, 1, STAGES, PARTIAL)),
                (_consume, (common, 2, STAGES, PARTIAL)),
                (_produce, (descs, smem, bars, place, span, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )


def hopper_forward(op: Operands, partial: bool) -> RelationStatistics | Partials:
    """As `forward.triton_forward`, for operands that `hopper.serves`."""
    b, heads, n, d_s = op.rows_s.shape
    blocks = BLOCKS_OF_HEAD_DIM[max(d_s, op.rows_t.shape[3])]
    rows = blocks.groups * ROWS.value
    planes = 5 if partial else 3
    out = torch.empty(planes, b, heads, n, dtype=torch.float32, device=op.rows_s.device)
    with torch.cuda.device_of(op.rows_s):
        _forward_kernel[(-(-n // rows) * b * heads,)](
            descriptor(op.rows_s, ROWS.value),
            descriptor(op.rows_t, ROWS.value),
            descriptor(op.cols_s, BLOCK_COLUMNS),
            descriptor(op.cols_t, BLOCK_COLUMNS),
            op.mask.col_lo_bn.contiguous(),
            op.mask.col_hi_bn.contiguous(),
            block_plan(op.mask, rows, BLOCK_COLUMNS),
            out,
            b,
            heads,
            op.group,
            n,
            tiling.section_heads(b * heads, op.cols_s, op.cols_t),
            op.scale_s * tiling.LOG2E.value,
            op.scale_t * tiling.LOG2E.value,
            GROUPS=blocks.groups,
            STAGES=blocks.stages,
            REGISTERS=blocks.registers,
            PARTIAL=partial,
            num_warps=4,
            maxnreg=blocks.entry_registers,
        )
    return Partials(*out) if partial else RelationStatistics(*out)
