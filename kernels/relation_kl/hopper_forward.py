"""Warp-specialised forward of the relation KL for Hopper (Gluon): the same sums as `forward`.

A block of 64 rows per consumer warpgroup meets the column tiles that a producer warp copies ahead
(TMA). A warpgroup multiplies S = X_s Y_s^T and T = X_t Y_t^T on the tensor cores, takes the
exponentials of S under the product T, and those of T under the products of the other
warpgroups (FlashAttention-3, arXiv 2407.08608, overlaps in the same two ways). That they take turns
is left to the hardware: enforcing it with barriers measured slower.

The online softmax is kept per thread: each of the four lanes that share a row has a maximum and
sums over its own quarter of the columns, and the four merge once, at the end, as any partials do.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import tiling
from .hopper_sums import (
    by_lane,
    quad_layout,
    share_maximum,
    spread,
    sum_columns,
    sweep_student,
    sweep_teacher,
)
from .hopper_tiles import ROWS, descriptor, own_block, thread_barrier, tile_range
from .operands import Operands
from .statistics import Partials, RelationStatistics

LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
# Scores of hidden pairs. A power of two, so that scaling it is exact and score - maximum cannot
# come out positive; finite, so that no difference of two is NaN.
HIDDEN: gl.constexpr = gl.constexpr(-(2.0**100))
# A sum of exponentials from which on a sweep with a fixed shift does not count, see `_consume`.
LIMIT: gl.constexpr = gl.constexpr(2.0**60)
# Three warpgroups of smaller tiles hide each other's latencies better than two of 128 columns.
GROUPS: gl.constexpr = gl.constexpr(3)
BLOCK_COLUMNS = 64
STAGES_OF_HEAD_DIM = {64: 6, 128: 3}  # what shared memory holds
# 512 threads enter with so many registers each; the producer hands most of its own on.
ENTRY_REGISTERS = 128
CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(160)
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit
def _tile(step, span):
    """The column tile of a step: those before and after the full ones first, then the full ones."""
    first, full_first, full_last, last = span
    full = full_last - full_first
    edges = last - first - full
    edge = first + step
    edge = gl.where(edge < full_first, edge, edge + full)
    return gl.where(step < edges, edge, full_first + step - edges)


@gluon.jit
def _next_attempt(attempt, flags, done, WARPS: gl.constexpr):
    """2, or 1 if a warpgroup's first sweep failed; waits for all of them."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
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
            start = _tile(step, span) * BLOCK_N
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
def _rows_by_cols(x, y, acc):
    """acc = x y^T, issued but not awaited: x [1, 1, 64, d] and y [1, 1, BLOCK_N, d] in smem."""
    x = x.reshape([x.shape[2], x.shape[3]])
    y = y.reshape([y.shape[2], y.shape[3]]).permute((1, 0))
    return warpgroup_mma(x, y, acc, use_acc=False, is_async=True)


@gluon.jit
def _branch_on(x):
    """x [64, 4] >= 0, past a branch that is never taken.

    Without a branch the assembler takes the wait for t first, and the tensor cores' second product
    runs under nothing.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred never; mov.b32 $0, $2; mov.b32 $1, $3; setp.lt.f32 never, $2, 0f00000000;"
        " stay: @never bra stay; }",
        "=f,=f,f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def _step(
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
    EXACT: gl.constexpr,
):
    """One column tile: two products, and the student's exponentials under the second of them."""
    x_s, x_t, y_s, y_t, flags = smem
    x_ready, s_ready, t_ready, free, done = bars
    BLOCK_N: gl.constexpr = y_s.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, mma)
    stage = step % STAGES
    phase = step // STAGES & 1
    mbarrier.wait(s_ready.index(stage), phase)
    s = _rows_by_cols(x_s.index(GROUP), y_s.index(stage), zero)
    mbarrier.wait(t_ready.index(stage), phase)
    t = _rows_by_cols(x_t.index(GROUP), y_t.index(stage), zero)
    s = warpgroup_mma_wait(1, deps=[s])
    m_s, l_s, m_t, l_t, a = state
    if EXACT:
        j = gl.expand_dims(start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma)), 0)
        allowed = (j >= gl.expand_dims(lo, 1)) & (j < gl.expand_dims(hi, 1))
        s = by_lane(gl.where(allowed, s, HIDDEN), BLOCK_N)
        m_s, l_s, v_s, shift_s = sweep_student(m_s, l_s, s, scale_s)
    else:
        v_s = by_lane(s, BLOCK_N) * scale_s - spread(shift_s)
        l_s += sum_columns(gl.exp2(v_s))
        l_s = _branch_on(l_s)
    t = warpgroup_mma_wait(0, deps=[t])
    mbarrier.arrive(free.index(stage))
    if EXACT:
        t = by_lane(gl.where(allowed, t, HIDDEN), BLOCK_N)
        m_t, l_t, a = sweep_teacher(m_t, l_t, a, t, scale_t, v_s, shift_s)
    else:
        v_t = by_lane(t, BLOCK_N) * scale_t - spread(shift_t)
        p_t = gl.exp2(v_t)
        l_t += sum_columns(p_t)
        a += sum_columns(p_t * (v_t - v_s))
    return m_s, l_s, m_t, l_t, a


@gluon.jit
def _consume(
    common,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """One warpgroup's 64 rows: sweep the tiles, merge the lanes, write the statistics.

    The tiles that need a mask, and the first that doesn't, are swept exactly, with running maxima.
    For the others each row's shift stays at the maximum found so far: fp32 sums of 2^v are as
    precise with v up to 60 as with v up to 0, so maxima would be taken for nothing. Scores that
    leave the shift by more show up in the sums (LIMIT); then the block is swept again, exactly.
    """
    smem, bars, intervals, out, place, span, sizes, scales = common
    x_ready, s_ready, t_ready, free, done = bars
    col_lo, col_hi = intervals
    scale_s, scale_t = scales
    n, plane = sizes
    first, full_first, full_last, last = span
    y_s = smem[2]
    flags = smem[4]
    BLOCK_N: gl.constexpr = y_s.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, quad_layout(BLOCK_N)))

    i = place[3] + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    lo = gl.load(col_lo + i, mask=i < n, other=0)
    hi = gl.load(col_hi + i, mask=i < n, other=0)
    i = place[3] + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, lanes))
    inside = i < n
    out += i
    mbarrier.wait(x_ready, 0)
    total = last - first
    exact = gl.minimum(total, total - (full_last - full_first) + 1)
    attempt = 0
    while attempt < 2:
        base = attempt * total
        low = gl.full([ROWS, 4], HIDDEN, gl.float32, lanes)
        nil = gl.zeros([ROWS, 4], gl.float32, lanes)
        state = (low, nil, low, nil, nil)
        for step in range(exact):
            start = _tile(step, span) * BLOCK_N
            state = _step(
                state, smem, bars, lo, hi, start, base + step, scale_s, scale_t, nil, nil,
                GROUP, STAGES, True,
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
        for step in range(exact, total):
            state = _step(
                state, smem, bars, lo, hi, 0, base + step, scale_s, scale_t, shift_s, shift_t,
                GROUP, STAGES, False,
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
    out,
    b,
    heads,
    group,
    n,
    section,
    scale_s,
    scale_t,
    STAGES: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """192 rows of one head. ``scale_*`` carry log2(e); ``out`` is [5 or 3, b, heads, n].

    rows_*, cols_*: TMA descriptors of [b, heads, length, d] with blocks of 64 and BLOCK_N vectors.
    """
    BLOCK_M: gl.constexpr = GROUPS * ROWS
    BLOCK_N: gl.constexpr = cols_s.block_shape[2]
    block, bh = own_block(gl.cdiv(n, BLOCK_M), b * heads, section, True)
    ib = bh // heads
    ih = bh % heads
    start_m = block * BLOCK_M
    col_lo += gl.cast(ib, gl.int64) * n
    col_hi += gl.cast(ib, gl.int64) * n
    span = tile_range(col_lo, col_hi, start_m, n, BLOCK_M, BLOCK_N)

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
    gl.warp_specialize(
        [
            (_consume, (common, 0, STAGES, PARTIAL)),
            (_consume, (common, 1, STAGES, PARTIAL)),
            (_consume, (common, 2, STAGES, PARTIAL)),
            (_produce, (descs, smem, bars, place, span, STAGES)),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def hopper_forward(op: Operands, partial: bool) -> RelationStatistics | Partials:
    """As `forward.triton_forward`, for operands that `hopper.serves`."""
    b, heads, n, d_s = op.rows_s.shape
    planes = 5 if partial else 3
    out = torch.empty(planes, b, heads, n, dtype=torch.float32, device=op.rows_s.device)
    with torch.cuda.device_of(op.rows_s):
        _forward_kernel[(-(-n // (GROUPS.value * ROWS.value)) * b * heads,)](
            descriptor(op.rows_s, ROWS.value),
            descriptor(op.rows_t, ROWS.value),
            descriptor(op.cols_s, BLOCK_COLUMNS),
            descriptor(op.cols_t, BLOCK_COLUMNS),
            op.mask.col_lo_bn.contiguous(),
            op.mask.col_hi_bn.contiguous(),
            out,
            b,
            heads,
            op.group,
            n,
            tiling.section_heads(b * heads, op.cols_s, op.cols_t),
            op.scale_s * tiling.LOG2E.value,
            op.scale_t * tiling.LOG2E.value,
            STAGES=STAGES_OF_HEAD_DIM[max(d_s, op.rows_t.shape[3])],
            PARTIAL=partial,
            num_warps=4,
            maxnreg=ENTRY_REGISTERS,
        )
    return Partials(*out) if partial else RelationStatistics(*out)
