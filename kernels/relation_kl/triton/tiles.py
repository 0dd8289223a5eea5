"""Tile sizes of the Triton kernels, and the device code that their forward and backward share.

Terms of the kernels in this folder and in ``hopper/``:

* A *block* is the BLOCK_M consecutive vectors of one operand that one program works for. They stay
  on the chip.
* A *tile* is BLOCK_N consecutive vectors of the other operand. A program *sweeps* the other
  operand: it multiplies its block by one tile after another.
* The mask gives each vector of the block one interval [lo, hi) of vectors of the other operand,
  which are its *allowed* partners. The interval is empty if lo >= hi.
* A tile is *full* if every vector of the block may be paired with every vector of the tile. A full
  tile needs no masking. A tile that holds some allowed pairs but is not full is an *edge* tile.

The suffixes ``_s`` and ``_t`` stand for student and teacher. Exponentials and logarithms on the
device have base 2, so scores carry a factor log2(e) there.

Kernels pass values on in named tuples, with two limits of Triton. Assigning a tuple to a name turns
compile-time constants in it into run-time values, so constants stay separate arguments. And the
compilation cache does not notice that the fields of a tuple were reordered: empty the cache then.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
# The interpreter multiplies the bit patterns of bf16 values, so there loads convert to fp32.
WIDEN = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# An index beyond every row and every column: the neutral element of a minimum over int32 indices.
BEYOND = tl.constexpr(2147483647)

# (bytes per element, padded head_dim up to) -> (BLOCK_M, BLOCK_N, warps, pipeline stages).
# 32-bit operands multiply in full fp32 outside the tensor cores. Their tiles are the largest that
# ptxas keeps in registers: four warps at head_dim 256 spill 77 kB per thread.
FORWARD_TILES = {
    (2, 64): (128, 128, 8, 3),
    (2, 128): (128, 64, 8, 3),
    (2, 256): (64, 64, 4, 2),
    (4, 64): (32, 64, 8, 2),
    (4, 128): (32, 32, 8, 2),
    (4, 256): (32, 32, 8, 1),
}
# Eight warps need a block of 128 vectors: with 64 both warpgroups would compute the same products.
BACKWARD_TILES = {
    (2, 64): (128, 64, 8, 3),
    (2, 128): (128, 64, 8, 3),
    (2, 256): (128, 32, 8, 2),
    (4, 64): (32, 64, 8, 2),
    (4, 128): (32, 32, 8, 2),
    (4, 256): (32, 32, 8, 1),
}
# Forward and backward take these tiles on GPUs with less shared memory per program than the entries
# above need (consumer Ampere and Ada have 99 kB). Compiled for sm_89, each takes at most 66 kB.
SMALL_TILES = {
    (2, 64): (64, 64, 4, 2),
    (2, 128): (64, 32, 4, 2),
    (2, 256): (32, 32, 4, 1),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 32, 4, 1),
    (4, 256): (16, 16, 4, 1),
}
# The most demanding entry of FORWARD_TILES and BACKWARD_TILES needs 197 kB of shared memory.
LARGE_SHARED_BYTES = 200 << 10
# The programs of one section run at the same time and share the L2 cache. The operands that they
# sweep take at most this many bytes together.
SECTION_BYTES = 32 << 20


class Pair(NamedTuple):
    """One quantity of the student and the same quantity of the teacher."""

    s: Any
    t: Any


class Interval(NamedTuple):
    """Half-open intervals [lo, hi), one per vector: two int32 tensors, or pointers to them."""

    lo: tl.tensor
    hi: tl.tensor


class TileSpan(NamedTuple):
    """The tiles [start, end) that a block visits; the tiles [full_start, full_end) are full.

    A block without full tiles has full_start = full_end = end.
    """

    start: tl.tensor
    full_start: tl.tensor
    full_end: tl.tensor
    end: tl.tensor


class Strides(NamedTuple):
    """Strides of a tensor [b, heads, length, d] in elements; the last dimension is contiguous."""

    batch: tl.tensor
    head: tl.tensor
    vector: tl.tensor


class Vectors(NamedTuple):
    """The vectors [length, head_dim] of one head in device memory.

    Attributes:
        pointer: Address of the first vector.
        stride: Number of elements from one vector to the next.
        length: Number of vectors.
    """

    pointer: tl.tensor
    stride: tl.tensor
    length: tl.tensor


def strides_of(x: torch.Tensor) -> Strides:
    """Return the strides of ``x`` [b, heads, length, d] as a kernel argument."""
    return Strides(*x.stride()[:3])


def choose_tiles(table: dict, *operands: torch.Tensor) -> tuple[int, int, int, int]:
    """Return (BLOCK_M, BLOCK_N, warps, pipeline stages) for some operands.

    The widest dtype and the largest head_dim among the operands decide. The entry comes from
    ``table`` if the GPU of the operands has the shared memory for it, and from SMALL_TILES if not.

    Args:
        table: FORWARD_TILES or BACKWARD_TILES.
        *operands: Tensors [b, heads, length, d].
    """
    if operands[0].is_cuda:
        properties = torch.cuda.get_device_properties(operands[0].device)
        if properties.shared_memory_per_block_optin < LARGE_SHARED_BYTES:
            table = SMALL_TILES
    item_bytes = max(x.element_size() for x in operands)
    d = max(x.shape[3] for x in operands)
    return table[item_bytes, next(width for width in (64, 128, 256) if d <= width)]


def section_heads(heads: int, *swept: torch.Tensor) -> int:
    """Return the number of (sequence, head) pairs in one section, see SECTION_BYTES.

    Args:
        heads: Number of (sequence, head) pairs in total; the result is at most this.
        *swept: The operands [b, heads, length, d] that the programs sweep.
    """
    head_bytes = sum(x.shape[2] * x.shape[3] * x.element_size() for x in swept)
    return max(1, min(heads, SECTION_BYTES // head_bytes))


@triton.constexpr_function
def padded_dim(d):
    """Return head_dim as a tile dimension: a power of two, at least 16 for the tensor cores."""
    return max(16, triton.next_power_of_2(d))


@triton.jit
def block_of_program(blocks, heads, section, HEAVY_LAST: tl.constexpr):
    """Return (block, head) of this program.

    Programs go through the heads section by section, and inside a section from heavy blocks to
    light ones, so that no heavy block runs alone at the end. In a causal relation the last blocks
    of rows see the most columns, and the first blocks of columns are seen by the most rows.

    Args:
        blocks: Number of blocks per head.
        heads: Number of (sequence, head) pairs.
        section: Number of (sequence, head) pairs in one section.
        HEAVY_LAST: Whether the blocks with the largest indices have the most work.
    """
    pid = tl.program_id(0)
    section_start = pid // (section * blocks) * section
    pid_in_section = pid - section_start * blocks
    width = tl.minimum(section, heads - section_start)
    block = pid_in_section // width
    if HEAVY_LAST:
        block = blocks - 1 - block
    return block, section_start + pid_in_section % width


@triton.jit
def load_vectors(vectors, start, D: tl.constexpr, BLOCK: tl.constexpr, BOUNDED: tl.constexpr):
    """Load the vectors [start, start + BLOCK) as [BLOCK, padded_dim(D)].

    Elements past D are 0, and so are vectors past the length if BOUNDED. Without BOUNDED all BLOCK
    vectors must exist.

    Args:
        vectors: ``Vectors`` of one head.
        start: Index of the first vector to load.
        D: head_dim.
    """
    PADDED_D: tl.constexpr = padded_dim(D)
    i = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, PADDED_D)[None, :]
    # Only the offset of the first vector can pass 2**31 elements.
    pointers = (
        vectors.pointer + tl.cast(start, tl.int64) * vectors.stride + (i * vectors.stride + c)
    )
    if BOUNDED:
        inside = start + i < vectors.length
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
def load_intervals(lo, hi, i, length):
    """Load the ``Interval`` of each vector ``i``; it is [0, 0) if empty or past the length."""
    lo = tl.load(lo + i, mask=i < length, other=0)
    hi = tl.load(hi + i, mask=i < length, other=0)
    nonempty = lo < hi
    return Interval(tl.where(nonempty, lo, 0), tl.where(nonempty, hi, 0))


@triton.jit
def tile_span(allowed, inside, BLOCK: tl.constexpr):
    """Return the ``TileSpan`` of a block.

    Vectors with an empty interval add no tiles to the span, but keep every tile from being full.
    Vectors past the length of their operand count for nothing.

    Args:
        allowed: The ``Interval`` of each vector of the block.
        inside: Whether each vector of the block exists.
        BLOCK: Number of vectors in a tile.
    """
    nonempty = allowed.lo < allowed.hi
    end = tl.cdiv(tl.max(allowed.hi, 0), BLOCK)
    start = tl.minimum(tl.min(tl.where(nonempty, allowed.lo, BEYOND), 0) // BLOCK, end)
    full_start = tl.cdiv(tl.max(allowed.lo, 0), BLOCK)
    full_end = tl.min(tl.where(inside, allowed.hi, BEYOND), 0) // BLOCK
    any_full = full_start < full_end
    return TileSpan(
        start, tl.where(any_full, full_start, end), tl.where(any_full, full_end, end), end
    )
