"""Warp-specialised backward of the relation KL for Hopper (Gluon): each pair of tiles once.

A block of 128 rows I meets the tiles of 64 columns J that it sees. Two warpgroups of 64 rows each
compute S, T and D = w (P_s - P_t), keep D for the reducer in shared memory and accumulate D X_J,
the rows' gradient, in registers. A third warpgroup, the reducer, multiplies D^T X_I, the columns'
gradient, and adds it to an fp32 buffer in device memory. Four half-products are issued where the
symmetric sweep of `backward` issues six.

Deterministic: the blocks of rows that see a tile of columns add to it in a fixed order, later rows
first, each waiting until a counter in device memory reaches its turn (as the deterministic mode of
FlashAttention). A block waits only for blocks of a lower program id, which start no later.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..operands import Operands
from ..triton import tiles as tiling
from ..triton.backward import FP16_LOG2_GAIN, split_weight
from .column_buffer import columns_gradient, from_slab, slab_offsets
from .column_reducer import STEP, TILE, reduce_columns, step_start
from .scheduler_order import BLOCK, reduction_order
from .tiles import (
    ROWS,
    descriptor,
    flat,
    own_block,
    rows_by_cols,
    thread_barrier,
    tile_range,
)

LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
SECTION_HEADS = 8  # that run side by side
# Columns from which on the heads of a group add to one buffer, in turns. Fewer are too few tiles to
# hide the turns: a buffer a head is faster by a third at 8192, by 8 % at 16384, and 7 % slower at
# 32768 (docs/performance.md).
SHARED_FROM = 32768
OWN_BUFFERS_BYTES = 1 << 30  # what one buffer a head may take; beyond it heads share as well
# 512 threads enter with 128 registers each.
ROWS_REGISTERS: gl.constexpr = gl.constexpr(192)
REDUCER_REGISTERS: gl.constexpr = gl.constexpr(104)
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit
def _produce(descs, smem, bars, place, span, STAGES: gl.constexpr):
    rows_s, rows_t, cols_s, cols_t = descs
    x_s, x_t, y_s, y_t, d = smem
    x_ready, s_ready, t_ready, free, d_ready, d_free, reduced = bars
    ib, ih, ih_cols, start_m = place
    first, full_first, full_last, last = span
    mbarrier.expect(x_ready, 2 * (rows_s.block_type.nbytes + rows_t.block_type.nbytes))
    for group in gl.static_range(2):
        start = start_m + group * ROWS
        tma.async_copy_global_to_shared(rows_s, [ib, ih, start, 0], x_ready, x_s.index(group))
        tma.async_copy_global_to_shared(rows_t, [ib, ih, start, 0], x_ready, x_t.index(group))
    for step in range(2 * (last - first)):
        stage = step % STAGES
        start = step_start(step, span)
        mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
        ready = s_ready.index(stage)
        mbarrier.expect(ready, cols_s.block_type.nbytes)
        tma.async_copy_global_to_shared(cols_s, [ib, ih_cols, start, 0], ready, y_s.index(stage))
        ready = t_ready.index(stage)
        mbarrier.expect(ready, cols_t.block_type.nbytes)
        tma.async_copy_global_to_shared(cols_t, [ib, ih_cols, start, 0], ready, y_t.index(stage))


@gluon.jit
def _step(
    acc,
    smem,
    bars,
    rows,
    start,
    step,
    scales,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    WEIGHTED: gl.constexpr,
):
    """One column tile: D to shared memory for the reducer, D X_J issued onto ``acc``."""
    x_s, x_t, y_s, y_t, d = smem
    x_ready, s_ready, t_ready, free, d_ready, d_free, reduced = bars
    lse_s, lse_t, weight, lo, hi = rows
    scale_s, scale_t = scales
    D_S: gl.constexpr = y_s.shape[4]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_S, 16])
    zero = gl.zeros([ROWS, STEP], gl.float32, mma)
    stage = step % STAGES
    phase = step // STAGES & 1
    mbarrier.wait(s_ready.index(stage), phase)
    s = rows_by_cols(x_s.index(GROUP), y_s.index(stage), zero)
    mbarrier.wait(t_ready.index(stage), phase)
    t = rows_by_cols(x_t.index(GROUP), y_t.index(stage), zero)
    s = warpgroup_mma_wait(1, deps=[s])
    p_s = gl.exp2(s * scale_s - gl.expand_dims(lse_s, 1))
    # long passed; it keeps the exponentials above from moving below the next wait
    mbarrier.wait(s_ready.index(stage), phase)
    t = warpgroup_mma_wait(0, deps=[t])
    delta = p_s - gl.exp2(t * scale_t - gl.expand_dims(lse_t, 1))
    if WEIGHTED:
        delta = delta * gl.expand_dims(weight, 1)
    if MASKED:
        j = gl.expand_dims(start + gl.arange(0, STEP, gl.SliceLayout(0, mma)), 0)
        allowed = (j >= gl.expand_dims(lo, 1)) & (j < gl.expand_dims(hi, 1))
        delta = gl.where(allowed, delta, 0.0)
    delta = delta.to(y_s.dtype)
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    slot = step & 1
    acc = warpgroup_mma(
        gl.convert_layout(delta, operand), flat(y_s.index(stage)), acc, is_async=True
    )
    mbarrier.wait(d_free.index(slot), (step // 2 & 1) ^ 1)
    d.index(slot * 2 + GROUP).store(delta)
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(d_ready.index(slot))
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index(stage))
    return acc


@gluon.jit
def _rows(
    common,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    SELF: gl.constexpr,
    WEIGHTED: gl.constexpr,
    HAS_UNIT: gl.constexpr,
    LOG2_GAIN: gl.constexpr,
):
    """64 rows: sweep their column tiles, then write their gradient."""
    smem, bars, pointers, place, span, scales, out, buffer, sizes = common
    lse_s, lse_t, weight, unit, col_lo, col_hi = pointers
    x_ready, s_ready, t_ready, free, d_ready, d_free, reduced = bars
    scale_s, scale_t, grad_scale = scales
    first, full_first, full_last, last = span
    n, grad_n = sizes
    y_s = smem[2]
    D_S: gl.constexpr = y_s.shape[4]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_S, 16])

    i = place[3] + GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    inside = i < n
    lo = gl.load(col_lo + i, mask=inside, other=0)
    hi = gl.load(col_hi + i, mask=inside, other=0)
    own_s = gl.load(lse_s + i, mask=inside, other=0.0) * LOG2E - LOG2_GAIN
    own_t = gl.load(lse_t + i, mask=inside, other=0.0) * LOG2E - LOG2_GAIN
    own_w = own_s
    if WEIGHTED:
        own_w = gl.load(weight + i, mask=inside, other=0.0)
    rows = (own_s, own_t, own_w, lo, hi)
    mbarrier.wait(x_ready, 0)
    acc = gl.zeros([ROWS, D_S], gl.float32, wide)
    full = 2 * (full_last - full_first)
    for step in range(full):
        acc = _step(
            acc, smem, bars, rows, 0, step, (scale_s, scale_t),
            GROUP, STAGES, False, WEIGHTED,
        )  # fmt: skip
    for step in range(full, 2 * (last - first)):
        acc = _step(
            acc, smem, bars, rows, step_start(step, span), step, (scale_s, scale_t),
            GROUP, STAGES, True, WEIGHTED,
        )  # fmt: skip
    grad = acc

    if SELF:  # the block's own columns: this block is the last that adds to them
        mbarrier.wait(reduced, 0)
        own = buffer + gl.cast(place[3] + GROUP * ROWS, gl.int64) * D_S
        own = gl.load(own + slab_offsets(D_S), cache_modifier=".cg")
        grad += from_slab(own, wide)
    grad = grad * grad_scale
    if HAS_UNIT:
        grad = grad * gl.load(unit)
    r = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    inside = gl.expand_dims(place[3] + r < n, 1)
    r = gl.expand_dims(r, 1)
    c = gl.expand_dims(gl.arange(0, D_S, gl.SliceLayout(0, wide)), 0)
    out += gl.cast(place[3], gl.int64) * grad_n
    gl.store(out + (r * grad_n + c), grad.to(out.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["b", "heads", "n", "m", "section"])
def _backward_kernel(
    rows_s,
    rows_t,
    cols_s,
    cols_t,
    lse_s,
    lse_t,
    weight,
    unit,
    col_lo,
    col_hi,
    spans,
    last_rows,
    grad,
    buffer,
    turns,
    grad_b,
    grad_h,
    grad_n,
    b,
    heads,
    group,
    share,
    n,
    m,
    section,
    scale_s,
    scale_t,
    grad_scale,
    STAGES: gl.constexpr,
    SELF: gl.constexpr,
    WEIGHTED: gl.constexpr,
    HAS_UNIT: gl.constexpr,
    LOG2_GAIN: gl.constexpr,
):
    """128 rows of one head. ``scale_*`` carry log2(e).

    rows_*, cols_*: TMA descriptors, as in the forward kernel, of blocks of 64 vectors.
    spans: [2, b, blocks] first and last tile to visit; last_rows: [b, tiles] the last block that
        visits a tile (`reduction_order`). buffer: [b, heads / share, tiles * TILE, d] fp32, in
        slabs (`hopper_slab`): ``share`` heads of a group add to the same.
    turns: [b, heads / share, tiles], zero.
    """
    BLOCK_M: gl.constexpr = 2 * ROWS
    D_S: gl.constexpr = cols_s.block_shape[3]
    blocks = gl.cdiv(n, BLOCK_M)
    tiles = gl.cdiv(m, TILE)
    block, bh = own_block(blocks, b * heads, section, True)
    ib = bh // heads
    ih = bh % heads
    start_m = block * BLOCK_M
    col_lo += gl.cast(ib, gl.int64) * n
    col_hi += gl.cast(ib, gl.int64) * n
    seen_first, full_first, full_last, seen_last = tile_range(
        col_lo, col_hi, start_m, n, BLOCK_M, TILE
    )
    first = gl.load(spans + ib * blocks + block)
    last = gl.load(spans + (b + ib) * blocks + block)
    some = full_first < full_last
    span = (first, gl.where(some, full_first, last), gl.where(some, full_last, last), last)

    x_s = gl.allocate_shared_memory(rows_s.dtype, [2] + rows_s.block_shape, rows_s.layout)
    x_t = gl.allocate_shared_memory(rows_t.dtype, [2] + rows_t.block_shape, rows_t.layout)
    y_s = gl.allocate_shared_memory(cols_s.dtype, [STAGES] + cols_s.block_shape, cols_s.layout)
    y_t = gl.allocate_shared_memory(cols_t.dtype, [STAGES] + cols_t.block_shape, cols_t.layout)
    delta_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    d = gl.allocate_shared_memory(cols_s.dtype, [4, ROWS, STEP], delta_layout)
    x_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    reduced = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    s_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    t_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    d_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    d_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(x_ready, 1)
    mbarrier.init(reduced, 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(s_ready.index(stage), 1)
        mbarrier.init(t_ready.index(stage), 1)
        mbarrier.init(free.index(stage), 2)
    for slot in gl.static_range(2):
        mbarrier.init(d_ready.index(slot), 2)
        mbarrier.init(d_free.index(slot), 1)

    stats = gl.cast(bh, gl.int64) * n
    if WEIGHTED:
        weight += stats
    pointers = (lse_s + stats, lse_t + stats, weight, unit, col_lo, col_hi)
    grad += gl.cast(ib, gl.int64) * grad_b + gl.cast(ih, gl.int64) * grad_h
    added_to = ib * (heads // share) + ih // share
    buffer += gl.cast(added_to, gl.int64) * (tiles * TILE * D_S)
    turns += added_to * tiles
    last_rows += ib * tiles
    smem = (x_s, x_t, y_s, y_t, d)
    bars = (x_ready, s_ready, t_ready, free, d_ready, d_free, reduced)
    place = (ib, ih, ih // group, start_m)
    scales = (scale_s, scale_t, grad_scale)
    common = (smem, bars, pointers, place, span, scales, grad, buffer, (n, grad_n))
    gl.warp_specialize(
        [
            (_rows, (common, 0, STAGES, SELF, WEIGHTED, HAS_UNIT, LOG2_GAIN)),
            (_rows, (common, 1, STAGES, SELF, WEIGHTED, HAS_UNIT, LOG2_GAIN)),
            (reduce_columns, (smem, bars, place, span, buffer, turns, last_rows, share)),
            (_produce, ((rows_s, rows_t, cols_s, cols_t), smem, bars, place, span, STAGES)),
        ],
        [4, 4, 1],
        [ROWS_REGISTERS, REDUCER_REGISTERS, PRODUCER_REGISTERS],
    )


def hopper_backward(
    op: Operands, lse_s: Tensor, lse_t: Tensor, row_weight: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """As `backward.triton_backward`."""
    weight, unit = split_weight(row_weight, op.rows_s.dtype)
    b, heads, n, d = op.rows_s.shape
    m = op.cols_s.shape[2]
    own_bytes = 4 * b * heads * m * d
    share = op.group if m >= SHARED_FROM or own_bytes > OWN_BUFFERS_BYTES else 1
    tiles = -(-m // BLOCK)
    spans, last_rows = reduction_order(op.mask, op.is_self)
    log2_gain = FP16_LOG2_GAIN if op.rows_s.dtype == torch.float16 else 0
    grad_scale = op.scale_s * 2.0**-log2_gain
    grad = torch.empty_like(op.rows_s, dtype=out_dtype)
    buffer = torch.empty(
        b, heads // share, tiles * BLOCK, d, dtype=torch.float32, device=grad.device
    )
    turns = torch.zeros(b, heads // share, tiles, dtype=torch.int32, device=grad.device)
    section = max(1, SECTION_HEADS // op.group) * op.group
    with torch.cuda.device_of(grad):
        _backward_kernel[(-(-n // BLOCK) * b * heads,)](
            descriptor(op.rows_s, 64),
            descriptor(op.rows_t, 64),
            descriptor(op.cols_s, 64),
            descriptor(op.cols_t, 64),
            lse_s.contiguous(),
            lse_t.contiguous(),
            lse_s if weight is None else weight,
            lse_s if unit is None else unit,
            op.mask.col_lo_bn.contiguous(),
            op.mask.col_hi_bn.contiguous(),
            spans,
            last_rows,
            grad,
            buffer,
            turns,
            *grad.stride()[:3],
            b,
            heads,
            op.group,
            share,
            n,
            m,
            section,
            op.scale_s * tiling.LOG2E.value,
            op.scale_t * tiling.LOG2E.value,
            grad_scale,
            STAGES=3,
            SELF=op.is_self,
            WEIGHTED=weight is not None,
            HAS_UNIT=unit is not None,
            LOG2_GAIN=log2_gain,
            num_warps=4,
            maxnreg=128,
        )
    if op.is_self:
        return grad, None
    return grad, columns_gradient(buffer, turns, op.cols_s, grad_scale, unit, out_dtype)
