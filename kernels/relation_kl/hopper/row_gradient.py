"""The two row warpgroups of the Hopper backward: D of each step, and the rows' gradient.

``backward`` has the drawing of all partitions, and the aggregates ``Buffers`` and ``Barriers``.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..triton.backward import RowStatistics
from ..triton.tiles import LOG2E, Interval, Pair, TileSpan
from .column_buffer import from_slab, slab_offsets
from .scheduler import backward_step_start
from .tiles import (
    STEP_COLUMNS,
    STEPS_PER_TILE,
    WARPGROUP_ROWS,
    Place,
    as_matrix,
    issue_scores,
    load_row_intervals,
    partition_barrier,
)


class Inputs(NamedTuple):
    """Pointers to the tensors that the row warpgroups read in addition to the operands.

    Attributes:
        stats: ``RowStatistics`` of pointers to the head's first row.
        unit: Pointer to one factor of the entire gradient.
        visible: ``Interval`` of pointers to [n]: the columns that each row of the sequence sees.
    """

    stats: RowStatistics
    unit: gl.tensor
    visible: Interval


class Scales(NamedTuple):
    """Factors of the products (they carry log2(e)), and the factor of the gradient."""

    s: gl.tensor
    t: gl.tensor
    gradient: gl.tensor


class Sizes(NamedTuple):
    """Number of rows per head, and number of elements from one row of the gradient to the next."""

    n: gl.tensor
    grad_stride: gl.tensor


class Program(NamedTuple):
    """The values that both row warpgroups of one program need.

    Attributes:
        buffers, barriers: ``backward.Buffers`` and ``backward.Barriers``.
        inputs: ``Inputs`` of the head.
        span: ``TileSpan`` of the block, in tiles of 128 columns.
        grad: Pointer to the head's first row of the rows' gradient.
        columns: Pointer to the head's slabs of the columns' gradient.
    """

    buffers: tuple
    barriers: tuple
    inputs: Inputs
    place: Place
    span: TileSpan
    scales: Scales
    grad: gl.tensor
    columns: gl.tensor
    sizes: Sizes


class Rows(NamedTuple):
    """One number per row of a warpgroup, [64].

    Attributes:
        lse_s, lse_t: Log-sum-exps in units of log2, reduced by LOG2_GAIN.
        weight: Weights; used if WEIGHTED.
        lo, hi: Interval of the columns that each row sees.
    """

    lse_s: gl.tensor
    lse_t: gl.tensor
    weight: gl.tensor
    lo: gl.tensor
    hi: gl.tensor


@gluon.jit
def _add_step(
    acc,
    buffers,
    barriers,
    rows,
    start,
    step,
    scale,
    WARPGROUP: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    WEIGHTED: gl.constexpr,
):
    """Return acc + D Y of one step, and hand D over to the column reducer.

    Args:
        acc: The rows' gradient so far, [64, D_S] fp32.
        buffers, barriers: ``backward.Buffers`` and ``backward.Barriers``.
        rows: ``Rows`` of the warpgroup.
        start: First column of the step; used if MASKED.
        step: Number of steps before this one.
        scale: ``Pair`` of factors of the products; they carry log2(e).
        WARPGROUP: Index of the row warpgroup, 0 or 1.
        MASKED: Whether the step may hold pairs that are not allowed.
        WEIGHTED: Whether rows have weights other than 1.
    """
    D_S: gl.constexpr = buffers.cols_s.shape[4]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP_COLUMNS, 16])
    gradient: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_S, 16])
    zero = gl.zeros([WARPGROUP_ROWS, STEP_COLUMNS], gl.float32, scores)
    stage = step % STAGES
    phase = step // STAGES & 1
    mbarrier.wait(barriers.cols_s_ready.index(stage), phase)
    s = issue_scores(buffers.rows_s.index(WARPGROUP), buffers.cols_s.index(stage), zero)
    mbarrier.wait(barriers.cols_t_ready.index(stage), phase)
    t = issue_scores(buffers.rows_t.index(WARPGROUP), buffers.cols_t.index(stage), zero)
    s = warpgroup_mma_wait(1, deps=[s])
    p_s = gl.exp2(s * scale.s - gl.expand_dims(rows.lse_s, 1))
    # This phase is complete already. Waiting for it once more keeps the compiler from moving these
    # exponentials behind the next wait, where they would no longer overlap with the product.
    mbarrier.wait(barriers.cols_s_ready.index(stage), phase)
    t = warpgroup_mma_wait(0, deps=[t])
    delta = p_s - gl.exp2(t * scale.t - gl.expand_dims(rows.lse_t, 1))
    if WEIGHTED:
        delta = delta * gl.expand_dims(rows.weight, 1)
    if MASKED:
        j = gl.expand_dims(start + gl.arange(0, STEP_COLUMNS, gl.SliceLayout(0, scores)), 0)
        pairs = (j >= gl.expand_dims(rows.lo, 1)) & (j < gl.expand_dims(rows.hi, 1))
        delta = gl.where(pairs, delta, 0.0)
    delta = delta.to(buffers.cols_s.dtype)
    operand: gl.constexpr = gl.DotOperandLayout(0, gradient, 2)
    slot = step & 1
    acc = warpgroup_mma(
        gl.convert_layout(delta, operand),
        as_matrix(buffers.cols_s.index(stage)),
        acc,
        is_async=True,
    )
    mbarrier.wait(barriers.delta_free.index(slot), (step // 2 & 1) ^ 1)
    buffers.delta.index(slot * 2 + WARPGROUP).store(delta)
    fence_async_shared()
    partition_barrier()
    mbarrier.arrive(barriers.delta_ready.index(slot))
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(barriers.cols_free.index(stage))
    return acc


@gluon.jit
def accumulate_rows(
    program,
    WARPGROUP: gl.constexpr,
    STAGES: gl.constexpr,
    SELF: gl.constexpr,
    WEIGHTED: gl.constexpr,
    HAS_UNIT: gl.constexpr,
    LOG2_GAIN: gl.constexpr,
):
    """Sweep the columns for one warpgroup's 64 rows, then write the rows' gradient."""
    buffers, barriers = program.buffers, program.barriers
    inputs, stats = program.inputs, program.inputs.stats
    place, span, scales = program.place, program.span, program.scales
    n, grad_stride = program.sizes.n, program.sizes.grad_stride
    D_S: gl.constexpr = buffers.cols_s.shape[4]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP_COLUMNS, 16])
    gradient: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_S, 16])

    first_row = place.row_start + WARPGROUP * WARPGROUP_ROWS
    i = first_row + gl.arange(0, WARPGROUP_ROWS, gl.SliceLayout(1, scores))
    inside = i < n
    allowed = load_row_intervals(inputs.visible, i, n)
    lse_s = gl.load(stats.lse_s + i, mask=inside, other=0.0) * LOG2E - LOG2_GAIN
    lse_t = gl.load(stats.lse_t + i, mask=inside, other=0.0) * LOG2E - LOG2_GAIN
    weight = lse_s
    if WEIGHTED:
        weight = gl.load(stats.weight + i, mask=inside, other=0.0)
    rows = Rows(lse_s, lse_t, weight, allowed.lo, allowed.hi)
    scale = Pair(scales.s, scales.t)
    mbarrier.wait(barriers.rows_ready, 0)
    acc = gl.zeros([WARPGROUP_ROWS, D_S], gl.float32, gradient)
    full_steps = STEPS_PER_TILE * (span.full_end - span.full_start)
    for step in range(full_steps):
        acc = _add_step(
            acc, buffers, barriers, rows, 0, step, scale,
            WARPGROUP, STAGES, MASKED=False, WEIGHTED=WEIGHTED,
        )  # fmt: skip
    for step in range(full_steps, STEPS_PER_TILE * (span.end - span.start)):
        acc = _add_step(
            acc, buffers, barriers, rows, backward_step_start(step, span), step, scale,
            WARPGROUP, STAGES, MASKED=True, WEIGHTED=WEIGHTED,
        )  # fmt: skip
    grad = acc

    if SELF:  # the gradient of these columns is complete: this block is the last to add to it
        mbarrier.wait(barriers.columns_added, 0)
        slab = program.columns + gl.cast(first_row, gl.int64) * D_S
        slab = gl.load(slab + slab_offsets(D_S), cache_modifier=".cg")
        grad += from_slab(slab, gradient)
    grad = grad * scales.gradient
    if HAS_UNIT:
        grad = grad * gl.load(inputs.unit)
    r = WARPGROUP * WARPGROUP_ROWS + gl.arange(0, WARPGROUP_ROWS, gl.SliceLayout(1, gradient))
    inside = gl.expand_dims(place.row_start + r < n, 1)
    r = gl.expand_dims(r, 1)
    c = gl.expand_dims(gl.arange(0, D_S, gl.SliceLayout(0, gradient)), 0)
    out = program.grad + gl.cast(place.row_start, gl.int64) * grad_stride
    gl.store(out + (r * grad_stride + c), grad.to(out.dtype.element_ty), mask=inside)
