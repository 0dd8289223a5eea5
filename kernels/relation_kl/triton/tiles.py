"""Tile sizes of the Triton kernels, and the device code that both kernels share."""

import torch
import triton
import triton.language as tl

# The interpreter multiplies bit patterns of bf16, so there everything is widened on load.
INTERPRETED = triton.knobs.runtime.interpret

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# (bytes per element, padded head_dim up to) -> (own block, other block, warps, stages).
# 32-bit operands multiply in full fp32 outside the tensor cores, hence their small tiles: the
# largest that ptxas keeps in registers (four warps at head_dim 256 spill 77 kB a thread).
FORWARD_TILES = {
    (2, 64): (128, 128, 8, 3),
    (2, 128): (128, 64, 8, 3),
    (2, 256): (64, 64, 4, 2),
    (4, 64): (32, 64, 8, 2),
    (4, 128): (32, 32, 8, 2),
    (4, 256): (32, 32, 8, 1),
}
# Eight warps need 128 rows of their own: with 64 both warpgroups would compute the same products.
BACKWARD_TILES = {
    (2, 64): (128, 64, 8, 3),
    (2, 128): (128, 64, 8, 3),
    (2, 256): (128, 32, 8, 2),
    (4, 64): (32, 64, 8, 2),
    (4, 128): (32, 32, 8, 2),
    (4, 256): (32, 32, 8, 1),
}
# For both passes on GPUs whose blocks have less shared memory than the tables above take (99 kB on
# consumer Ampere and Ada); as compiled for sm_89 none of these takes more than 66 kB.
SMALL_TILES = {
    (2, 64): (64, 64, 4, 2),
    (2, 128): (64, 32, 4, 2),
    (2, 256): (32, 32, 4, 1),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 32, 4, 1),
    (4, 256): (16, 16, 4, 1),
}
# The largest of FORWARD_TILES and BACKWARD_TILES takes 197 kB of a block's shared memory.
LARGE_SHARED_BYTES = 200 << 10
# Heads that run side by side share the L2: their other operands together stay below this.
SECTION_BYTES = 32 << 20


def choose_tiles(table: dict, *operands: torch.Tensor) -> tuple[int, int, int, int]:
    """(own block, other block, warps, stages) for the widest dtype and head_dim of the operands.

    From ``table`` where the operands' GPU has the shared memory for it, else from SMALL_TILES.
    """
    if operands[0].is_cuda:
        properties = torch.cuda.get_device_properties(operands[0].device)
        if properties.shared_memory_per_block_optin < LARGE_SHARED_BYTES:
            table = SMALL_TILES
    item_bytes = max(x.element_size() for x in operands)
    d = max(x.shape[3] for x in operands)
    return table[item_bytes, next(width for width in (64, 128, 256) if d <= width)]


def padded_dim(d: int) -> int:
    """head_dim as a tile dimension: a power of two, at least 16 for the tensor cores."""
    return max(16, triton.next_power_of_2(d))


def section_heads(heads: int, *others: torch.Tensor) -> int:
    """How many (sequence, head) pairs run side by side, out of ``heads``."""
    head_bytes = sum(x.shape[2] * x.shape[3] * x.element_size() for x in others)
    return max(1, min(heads, SECTION_BYTES // head_bytes))


@triton.jit
def own_block(blocks, heads, section, HEAVY_LAST: tl.constexpr):
    """(block, head) of this program: heads in sections, within a section heavy blocks first.

    In a causal relation the last rows see the most columns, and the first columns the most rows.
    """
    pid = tl.program_id(0)
    first_head = pid // (section * blocks) * section
    within = pid - first_head * blocks
    width = tl.minimum(section, heads - first_head)
    block = within // width
    if HEAVY_LAST:
        block = blocks - 1 - block
    return block, first_head + within % width


@triton.jit
def load_vectors(
    base,
    start,
    stride,
    count,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Vectors [BLOCK, PADDED_D] from ``start`` on; zeros past D, and past ``count`` if BOUNDED."""
    i = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, PADDED_D)[None, :]
    # Only the block's own offset can pass 2**31 elements.
    pointers = base + tl.cast(start, tl.int64) * stride + (i * stride + c)
    if BOUNDED:
        inside = start + i < count
        if D != PADDED_D:
            inside = inside & (c < D)
        x = tl.load(pointers, mask=inside, other=0.0)
    elif D != PADDED_D:
        x = tl.load(pointers, mask=c < D, other=0.0)
    else:
        x = tl.load(pointers)
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_intervals(lo_ptr, hi_ptr, own, count):
    """The intervals [lo, hi) of the block's own vectors; (0, 0) past ``count`` and for empty."""
    lo = tl.load(lo_ptr + own, mask=own < count, other=0)
    hi = tl.load(hi_ptr + own, mask=own < count, other=0)
    live = lo < hi
    return tl.where(live, lo, 0), tl.where(live, hi, 0)


@triton.jit
def tile_range(lo, hi, inside, BLOCK: tl.constexpr):
    """Tiles [first, last) that any own vector sees, and [full_first, full_last) that all see whole.

    Empty own vectors are not visited for, but leave no tile full. Without a full tile
    full_first = full_last = last. Vectors outside don't count.
    """
    FAR: tl.constexpr = 2147483647
    live = lo < hi
    last = tl.cdiv(tl.max(hi, 0), BLOCK)
    first = tl.minimum(tl.min(tl.where(live, lo, FAR), 0) // BLOCK, last)
    full_first = tl.cdiv(tl.max(lo, 0), BLOCK)
    full_last = tl.min(tl.where(inside, hi, FAR), 0) // BLOCK
    some = full_first < full_last
    return first, last, tl.where(some, full_first, last), tl.where(some, full_last, last)
