"""The third warpgroup of the Hopper backward: it adds up the columns' gradient in a fixed order.

``backward`` has the drawing of all partitions, and the aggregates ``Buffers`` and ``Barriers``.

The blocks that visit a tile take turns. A counter in device memory holds the number of additions to
the tile so far. A block adds when the counter equals its turn (``scheduler.backward_turn``), and
then increases the counter. Where heads share a buffer, each of them takes a turn for every block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .column_buffer import slab_offsets, to_slab
from .scheduler import backward_step_start, backward_tile, backward_turn
from .tiles import (
    BACKWARD_BLOCK_ROWS,
    STEP_COLUMNS,
    STEPS_PER_TILE,
    as_matrix,
    partition_barrier,
)


@gluon.jit
def _read_turn(counter):
    """Return how many blocks have added to a tile; their additions are visible afterwards."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 seen;
            ld.acquire.gpu.global.u32 seen, [$1];
            redux.sync.min.u32 $0, seen, 0xffffffff;
        }""", "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _pass_turn(counter):
    """Let the next block add to a tile, after the additions of all threads of this partition."""
    partition_barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")


@gluon.jit
def reduce_columns(buffers, barriers, place, span, gradient, turns, last_blocks, share):
    """Add D^T X of every step to the columns' gradient, each tile when it is this block's turn.

    X are the block's rows of the student.

    Args:
        buffers, barriers: ``backward.Buffers`` and ``backward.Barriers``.
        place: ``Place`` of the block.
        span: ``TileSpan`` of the block.
        gradient: Pointer to the head's slabs, [tiles * 128, D_S] fp32 (``column_buffer``).
        turns: Pointer to [tiles] int32: the counters.
        last_blocks: Pointer to [tiles] int32: the last block that visits each tile.
        share: Number of row heads that add to the same gradient.
    """
    D_S: gl.constexpr = buffers.cols_s.shape[4]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_S, 16])
    zero = gl.zeros([STEP_COLUMNS, D_S], gl.float32, mma)
    offsets = slab_offsets(D_S)
    block = place.row_start // BACKWARD_BLOCK_ROWS
    mbarrier.wait(barriers.rows_ready, 0)
    counter = turns
    turn = 0
    for step in range(STEPS_PER_TILE * (span.end - span.start)):
        slot = step & 1
        tile = backward_tile(step // STEPS_PER_TILE, span)
        start = backward_step_start(step, span)
        target = gradient + gl.cast(start, gl.int64) * D_S + offsets
        mbarrier.wait(barriers.delta_ready.index(slot), step // 2 & 1)
        part = warpgroup_mma(
            buffers.delta.index(slot * 2).permute((1, 0)), as_matrix(buffers.rows_s.index(0)),
            zero, use_acc=False, is_async=True,
        )  # fmt: skip
        part = warpgroup_mma(
            buffers.delta.index(slot * 2 + 1).permute((1, 0)), as_matrix(buffers.rows_s.index(1)),
            part, is_async=True,
        )  # fmt: skip
        # While these products run, pass the previous tile on, whose additions have had time to
        # complete, and wait for this block's turn at the new tile.
        if slot == 0:
            if step > 0:
                _pass_turn(counter)
            counter = turns + tile
            turn = backward_turn(gl.load(last_blocks + tile), block, place.row_head, share)
            seen = _read_turn(counter)
            while seen < turn:
                seen = _read_turn(counter)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(barriers.delta_free.index(slot))
        if turn == 0:  # nothing was added yet, and the memory is not initialized
            gl.store(target, to_slab(part))
        else:
            gl.atomic_add(target, to_slab(part), sem="relaxed", scope="gpu")
    if span.end > span.start:
        _pass_turn(counter)
    partition_barrier()
    mbarrier.arrive(barriers.columns_added)
