"""The Hopper backward's third warpgroup: the columns' gradient, added up in a fixed order."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .column_buffer import as_slab, slab_offsets
from .tiles import ROWS, flat, thread_barrier

STEP: gl.constexpr = gl.constexpr(64)  # columns multiplied at a time
TILE: gl.constexpr = gl.constexpr(128)  # columns between two turns


@gluon.jit
def _tile(index, span):
    """The index-th tile of columns to visit: full tiles first, then those before and after them."""
    first, full_first, full_last, last = span
    full = full_last - full_first
    edge = first + index - full
    edge = gl.where(edge < full_first, edge, edge + full)
    return gl.where(index < full, full_first + index, edge)


@gluon.jit
def step_start(step, span):
    """The first column of a step: each tile takes two, of 64 columns each."""
    return _tile(step // 2, span) * TILE + (step & 1) * STEP


@gluon.jit
def _turn(counter):
    """How many blocks have added to a tile; what they added is visible afterwards."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 seen;
            ld.acquire.gpu.global.u32 seen, [$1];
            redux.sync.min.u32 $0, seen, 0xffffffff;
        }""", "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _pass_turn(counter):
    """One more block has added to a tile."""
    thread_barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")


@gluon.jit
def reduce_columns(smem, bars, place, span, buffer, turns, last_rows, share):
    """D^T X_I of every tile, added to the buffer when it is this block's turn."""
    x_s, x_t, y_s, y_t, d = smem
    x_ready, s_ready, t_ready, free, d_ready, d_free, reduced = bars
    first, full_first, full_last, last = span
    D_S: gl.constexpr = y_s.shape[4]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_S, 16])
    zero = gl.zeros([STEP, D_S], gl.float32, wide)
    offsets = slab_offsets(D_S)
    block = place[3] // (2 * ROWS)
    mbarrier.wait(x_ready, 0)
    counter = turns
    turn = 0
    for step in range(2 * (last - first)):
        slot = step & 1
        tile = _tile(step // 2, span)
        target = buffer + gl.cast(step_start(step, span), gl.int64) * D_S + offsets
        mbarrier.wait(d_ready.index(slot), step // 2 & 1)
        part = warpgroup_mma(
            d.index(slot * 2).permute((1, 0)), flat(x_s.index(0)), zero,
            use_acc=False, is_async=True,
        )  # fmt: skip
        part = warpgroup_mma(
            d.index(slot * 2 + 1).permute((1, 0)), flat(x_s.index(1)), part, is_async=True
        )
        # Under these products: the last tile's additions have landed by now, so pass it on, and
        # wait for this tile's turn.
        if slot == 0:
            if step > 0:
                _pass_turn(counter)
            counter = turns + tile
            turn = (gl.load(last_rows + tile) - block) * share + place[1] % share
            seen = _turn(counter)
            while seen < turn:
                seen = _turn(counter)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(d_free.index(slot))
        if turn == 0:  # the first block to have its turn finds nothing there yet
            gl.store(target, as_slab(part))
        else:
            gl.atomic_add(target, as_slab(part), sem="relaxed", scope="gpu")
    if last > first:
        _pass_turn(counter)
    thread_barrier()
    mbarrier.arrive(reduced)
