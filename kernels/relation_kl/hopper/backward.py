"""Warp-specialized backward of the relation KL for Hopper (Gluon): each tile is visited once.

The equations are in ``triton.backward``, with D = w (P_s - P_t). A program works for a block X of
128 rows and goes through the columns Y that these rows see, 64 columns per step. Two row warpgroups
of 64 rows each compute S, T and D, hand D over in shared memory, and accumulate D Y, the rows'
gradient, in registers. A third warpgroup, the column reducer, multiplies D^T X, the columns'
gradient, and adds it to an fp32 buffer in device memory. A producer warp copies the operands ahead.
A tile takes four products: S, T, D Y and D^T X. ``triton.backward`` visits a tile once per role,
with three products each time, and so takes six.

Time runs to the right. The drawing follows step k; a box is work, an arrow is a barrier:

    producer       [Y k ][Y k+1][Y k+2]                    [Y k+3]
    warp                |                                  ^
                        | cols_s_ready,                    | cols_free
                        v cols_t_ready                     |
    row warp-            [S k][T k  ][exp T, D][store D k] [S k+1][T k+1 ...
    groups 0, 1               [exp S]          [D Y k    ]
                                                         |
                                                         | delta_ready
                                                         v
    column         [D^T X k-1][add k-1]                   [D^T X k][add k]
    reducer                                               [turn   ]
                                                                 |
                                                                 | delta_free
                                                                 v
    row warpgroups                                                [store D k+2]

Boxes one below the other run at the same time: the lower one on the ordinary units while the tensor
cores multiply (for D Y and the store, the other way round). "turn" happens at even steps, where a
tile begins: the reducer passes the previous tile on and waits for its turn at the new one. Y has
three stages and D has two slots, hence Y k+3 and D k+2.

    barrier        who arrives, when                        who waits, before what
    rows_ready     copy engine: the block's rows are there  row warpgroups, before the first S;
                                                            reducer, before the first D^T X
    cols_s_ready   copy engine: the student's Y k is there  row warpgroups, before S k
    cols_t_ready   copy engine: the teacher's Y k is there  row warpgroups, before T k
    cols_free      both row warpgroups, after D Y k         producer, before the copy of Y k+3
    delta_ready    both row warpgroups, after store D k     reducer, before D^T X k
    delta_free     reducer, after D^T X k                   row warpgroups, before store D k+2
    columns_added  reducer, after its last addition         row warpgroups, before they read tile i
                                                            of the buffer (self relation, block i)

In a self relation the columns of tile i are the rows of block i, and block i is the last one to add
to them. So its row warpgroups add tile i to the rows' gradient, and no further launch is needed.

The result is deterministic: the blocks that visit a tile add to it in a fixed order, later rows
first, each waiting until a counter in device memory reaches its turn (``column_reducer``), as in
the deterministic mode of FlashAttention. There is no deadlock: a block waits only for blocks of a
lower program id, which start no later.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..operands import Operands
from ..triton.backward import FP16_LOG2_GAIN, RowStatistics, split_weight
from ..triton.tiles import LOG2E, Interval, TileSpan, strides_of
from .column_buffer import columns_gradient
from .column_reducer import reduce_columns
from .row_gradient import Inputs, Program, Scales, Sizes, accumulate_rows
from .scheduler import backward_order, backward_step_start
from .tiles import (
    BACKWARD_BLOCK_ROWS,
    BACKWARD_TILE_COLUMNS,
    STEP_COLUMNS,
    STEPS_PER_TILE,
    WARPGROUP_ROWS,
    Descriptors,
    Place,
    block_of_program,
    tile_span,
    tma_descriptor,
)

# Number of heads whose programs run at the same time, see ``block_of_program``.
SECTION_HEADS = 8
# From this many columns on, the heads of a group add to one buffer, in turns. Shorter sequences
# have too few tiles to hide the turns: one buffer per head is faster by a third at 8192 columns, by
# 8 % at 16384, and 7 % slower at 32768 (docs/performance_history.md).
SHARED_BUFFER_FROM_COLUMNS = 32768
# One buffer per head may take this many bytes; if it took more, the heads of a group share one.
BUFFER_PER_HEAD_BYTES = 1 << 30
# Registers per thread, after the 512 threads started with 128 each.
LAUNCH_REGISTERS = 128
ROW_REGISTERS: gl.constexpr = gl.constexpr(192)
REDUCER_REGISTERS: gl.constexpr = gl.constexpr(104)
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)
COLUMN_STAGES = 3


class Buffers(NamedTuple):
    """Shared memory of a program.

    Attributes:
        rows_s, rows_t: [2, 1, 1, 64, d], the block's rows, by warpgroup.
        cols_s, cols_t: [stages, 1, 1, 64, d], a ring of the columns of a step.
        delta: [4, 64, 64], D of both row warpgroups in two slots: index slot * 2 + warpgroup. A
            tile has two steps, so a tile always begins in slot 0.
    """

    rows_s: gl.shared_memory_descriptor
    rows_t: gl.shared_memory_descriptor
    cols_s: gl.shared_memory_descriptor
    cols_t: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor


class Barriers(NamedTuple):
    """The barriers of a program; the table at the top says who arrives and who waits.

    Attributes:
        rows_ready, columns_added: One barrier.
        cols_s_ready, cols_t_ready, cols_free: [stages, 1].
        delta_ready, delta_free: [2, 1], one barrier per slot.
    """

    rows_ready: gl.shared_memory_descriptor
    cols_s_ready: gl.shared_memory_descriptor
    cols_t_ready: gl.shared_memory_descriptor
    cols_free: gl.shared_memory_descriptor
    delta_ready: gl.shared_memory_descriptor
    delta_free: gl.shared_memory_descriptor
    columns_added: gl.shared_memory_descriptor


@gluon.jit
def _produce(descriptors, buffers, barriers, place, span, STAGES: gl.constexpr):
    """Copy the block's rows, then the columns of each step as its stage becomes free."""
    rows_s, rows_t = descriptors.rows_s, descriptors.rows_t
    cols_s, cols_t = descriptors.cols_s, descriptors.cols_t
    ready = barriers.rows_ready
    mbarrier.expect(ready, 2 * (rows_s.block_type.nbytes + rows_t.block_type.nbytes))
    for warpgroup in gl.static_range(2):
        at = [place.batch, place.row_head, place.row_start + warpgroup * WARPGROUP_ROWS, 0]
        tma.async_copy_global_to_shared(rows_s, at, ready, buffers.rows_s.index(warpgroup))
        tma.async_copy_global_to_shared(rows_t, at, ready, buffers.rows_t.index(warpgroup))
    for step in range(STEPS_PER_TILE * (span.end - span.start)):
        stage = step % STAGES
        at = [place.batch, place.col_head, backward_step_start(step, span), 0]
        mbarrier.wait(barriers.cols_free.index(stage), (step // STAGES & 1) ^ 1)
        ready = barriers.cols_s_ready.index(stage)
        mbarrier.expect(ready, cols_s.block_type.nbytes)
        tma.async_copy_global_to_shared(cols_s, at, ready, buffers.cols_s.index(stage))
        ready = barriers.cols_t_ready.index(stage)
        mbarrier.expect(ready, cols_t.block_type.nbytes)
        tma.async_copy_global_to_shared(cols_t, at, ready, buffers.cols_t.index(stage))


@gluon.jit(do_not_specialize=["b", "heads", "n", "m", "section"])
def _backward_kernel(
    rows_s,
    rows_t,
    cols_s,
    cols_t,
    stats,
    unit,
    visible,
    spans,
    last_blocks,
    grad,
    columns,
    turns,
    grad_strides,
    b,
    heads,
    group,
    share,
    n,
    m,
    section,
    scales,
    STAGES: gl.constexpr,
    SELF: gl.constexpr,
    WEIGHTED: gl.constexpr,
    HAS_UNIT: gl.constexpr,
    LOG2_GAIN: gl.constexpr,
):
    """Write the gradient of 128 rows of one head, and add to the gradient of the columns they see.

    Args:
        rows_s, rows_t: TMA descriptors of [b, heads, n, d], 64 vectors per copy.
        cols_s, cols_t: TMA descriptors of [b, heads / group, m, d], 64 vectors per copy.
        stats: ``RowStatistics`` of pointers, [b, heads, n] fp32, contiguous, lse in nats.
        unit: One fp32 number, a factor of the entire gradient, if HAS_UNIT.
        visible: ``Interval`` of pointers to [b, n]: the columns that each row sees.
        spans: int32 [2, b, blocks] of ``scheduler.backward_order``.
        last_blocks: int32 [b, tiles] of ``scheduler.backward_order``.
        grad: [b, heads, n, D_S], the rows' gradient; of a self relation the entire gradient.
        columns: [b, heads / share, tiles * 128, D_S] fp32, in slabs, uninitialized: the columns'
            gradient, unscaled. ``share`` heads of a group add to the same part.
        turns: int32 [b, heads / share, tiles], zero: the counters of ``column_reducer``.
        grad_strides: ``Strides`` of grad.
        group: Number of row heads per column head.
        share: Number of row heads per part of ``columns``.
        section: Number of (sequence, head) pairs in one section, see ``block_of_program``.
        scales: ``Scales``; the gradient's is scale_s / 2^LOG2_GAIN.
        SELF: Whether the columns are the rows.
        WEIGHTED: Whether rows have weights other than 1.
        LOG2_GAIN: D is multiplied by 2^LOG2_GAIN before it is rounded to the operands' dtype.
    """
    D_S: gl.constexpr = cols_s.block_shape[3]
    blocks = gl.cdiv(n, BACKWARD_BLOCK_ROWS)
    tiles = gl.cdiv(m, BACKWARD_TILE_COLUMNS)
    block, bh = block_of_program(blocks, b * heads, section, True)
    ib = bh // heads
    ih = bh % heads
    row_start = block * BACKWARD_BLOCK_ROWS
    visible = Interval(
        visible.lo + gl.cast(ib, gl.int64) * n, visible.hi + gl.cast(ib, gl.int64) * n
    )
    needed = tile_span(visible, row_start, n, BACKWARD_BLOCK_ROWS, BACKWARD_TILE_COLUMNS)
    # The block also visits tiles that none of its rows sees, see ``backward_order``.
    start = gl.load(spans + ib * blocks + block)
    end = gl.load(spans + (b + ib) * blocks + block)
    any_full = needed.full_start < needed.full_end
    span = TileSpan(
        start,
        gl.where(any_full, needed.full_start, end),
        gl.where(any_full, needed.full_end, end),
        end,
    )

    rows_s_buffer = gl.allocate_shared_memory(rows_s.dtype, [2] + rows_s.block_shape, rows_s.layout)
    rows_t_buffer = gl.allocate_shared_memory(rows_t.dtype, [2] + rows_t.block_shape, rows_t.layout)
    cols_s_buffer = gl.allocate_shared_memory(
        cols_s.dtype, [STAGES] + cols_s.block_shape, cols_s.layout
    )
    cols_t_buffer = gl.allocate_shared_memory(
        cols_t.dtype, [STAGES] + cols_t.block_shape, cols_t.layout
    )
    delta_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    delta_buffer = gl.allocate_shared_memory(
        cols_s.dtype, [4, WARPGROUP_ROWS, STEP_COLUMNS], delta_layout
    )
    buffers = Buffers(rows_s_buffer, rows_t_buffer, cols_s_buffer, cols_t_buffer, delta_buffer)
    rows_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    columns_added = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    cols_s_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    cols_t_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    cols_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    delta_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    delta_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(rows_ready, 1)
    mbarrier.init(columns_added, 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(cols_s_ready.index(stage), 1)
        mbarrier.init(cols_t_ready.index(stage), 1)
        mbarrier.init(cols_free.index(stage), 2)
    for slot in gl.static_range(2):
        mbarrier.init(delta_ready.index(slot), 2)
        mbarrier.init(delta_free.index(slot), 1)
    barriers = Barriers(
        rows_ready=rows_ready,
        cols_s_ready=cols_s_ready,
        cols_t_ready=cols_t_ready,
        cols_free=cols_free,
        delta_ready=delta_ready,
        delta_free=delta_free,
        columns_added=columns_added,
    )

    row_offset = gl.cast(bh, gl.int64) * n
    weight = stats.weight
    if WEIGHTED:
        weight += row_offset
    stats = RowStatistics(stats.lse_s + row_offset, stats.lse_t + row_offset, weight)
    grad += gl.cast(ib, gl.int64) * grad_strides.batch + gl.cast(ih, gl.int64) * grad_strides.head
    part = ib * (heads // share) + ih // share
    columns += gl.cast(part, gl.int64) * (tiles * BACKWARD_TILE_COLUMNS * D_S)
    turns += part * tiles
    last_blocks += ib * tiles
    place = Place(ib, ih, ih // group, row_start)
    descriptors = Descriptors(rows_s, rows_t, cols_s, cols_t)
    program = Program(
        buffers=buffers,
        barriers=barriers,
        inputs=Inputs(stats, unit, visible),
        place=place,
        span=span,
        scales=scales,
        grad=grad,
        columns=columns,
        sizes=Sizes(n, grad_strides.vector),
    )
    gl.warp_specialize(
        [
            (accumulate_rows, (program, 0, STAGES, SELF, WEIGHTED, HAS_UNIT, LOG2_GAIN)),
            (accumulate_rows, (program, 1, STAGES, SELF, WEIGHTED, HAS_UNIT, LOG2_GAIN)),
            (reduce_columns, (buffers, barriers, place, span, columns, turns, last_blocks, share)),
            (_produce, (descriptors, buffers, barriers, place, span, STAGES)),
        ],
        [4, 4, 1],
        [ROW_REGISTERS, REDUCER_REGISTERS, PRODUCER_REGISTERS],
    )


def hopper_backward(
    op: Operands, lse_s: Tensor, lse_t: Tensor, row_weight: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of sum_i w_i KL_i, as ``triton.backward.triton_backward`` does.

    One launch computes both gradients. The columns' gradient of two operands takes a second, short
    launch that brings it from slabs into its place.
    """
    weight, unit = split_weight(row_weight, op.rows_s.dtype)
    b, heads, n, d = op.rows_s.shape
    m = op.cols_s.shape[2]
    block_rows, tile_columns = BACKWARD_BLOCK_ROWS.value, BACKWARD_TILE_COLUMNS.value
    bytes_with_buffer_per_head = 4 * b * heads * m * d
    shared = m >= SHARED_BUFFER_FROM_COLUMNS or bytes_with_buffer_per_head > BUFFER_PER_HEAD_BYTES
    share = op.group if shared else 1
    tiles = -(-m // tile_columns)
    spans, last_blocks = backward_order(op.mask, op.is_self)
    log2_gain = FP16_LOG2_GAIN if op.rows_s.dtype == torch.float16 else 0
    grad_scale = op.scale_s * 2.0**-log2_gain
    grad = torch.empty_like(op.rows_s, dtype=out_dtype)
    columns = torch.empty(
        b, heads // share, tiles * tile_columns, d, dtype=torch.float32, device=grad.device
    )
    turns = torch.zeros(b, heads // share, tiles, dtype=torch.int32, device=grad.device)
    section = max(1, SECTION_HEADS // op.group) * op.group
    with torch.cuda.device_of(grad):
        _backward_kernel[(-(-n // block_rows) * b * heads,)](
            tma_descriptor(op.rows_s, WARPGROUP_ROWS.value),
            tma_descriptor(op.rows_t, WARPGROUP_ROWS.value),
            tma_descriptor(op.cols_s, STEP_COLUMNS.value),
            tma_descriptor(op.cols_t, STEP_COLUMNS.value),
            RowStatistics(
                lse_s.contiguous(), lse_t.contiguous(), lse_s if weight is None else weight
            ),
            lse_s if unit is None else unit,
            Interval(op.mask.col_lo_bn.contiguous(), op.mask.col_hi_bn.contiguous()),
            spans,
            last_blocks,
            grad,
            columns,
            turns,
            strides_of(grad),
            b,
            heads,
            op.group,
            share,
            n,
            m,
            section,
            Scales(op.scale_s * LOG2E.value, op.scale_t * LOG2E.value, grad_scale),
            STAGES=COLUMN_STAGES,
            SELF=op.is_self,
            WEIGHTED=weight is not None,
            HAS_UNIT=unit is not None,
            LOG2_GAIN=log2_gain,
            num_warps=4,
            maxnreg=LAUNCH_REGISTERS,
        )
    if op.is_self:
        return grad, None
    return grad, columns_gradient(columns, turns, op.cols_s, grad_scale, unit, out_dtype)
