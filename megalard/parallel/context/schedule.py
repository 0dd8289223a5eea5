"""Which rank computes which part of a relation whose sequence is split over P ranks.

This module is a pure function of P and the rank. The sequence is cut into 2P pieces; rank r owns
chunk r, the pieces r and 2P-1-r, which balances causal attention. A relation needs every unordered
pair of chunks once, and every chunk with itself.

Take a difference cover A of Z_P: a set of numbers whose differences modulo P give every residue.
Rank r holds the chunks r + A and takes, for every difference, one pair of the chunks that it holds.
All ranks then have the same work, and each fetches |A| - 1 chunks, where a ring or an all-gather
fetches P - 1. For P = 4 the cover is A = {0, 1, 2}:

    piece             0   1   2   3   4   5   6   7
    owner (chunk)     0   1   2   3   3   2   1   0

    rank    owns    fetches    pairs that it computes
      0       0       1, 2     0-0   0-1   half of 0-2
      1       1       2, 3     1-1   1-2   half of 1-3
      2       2       3, 0     2-2   2-3   half of 2-0
      3       3       0, 1     3-3   3-0   half of 3-1

The pair at the difference P/2 belongs to two ranks, and each of them takes half of its rows. A pair
of chunks takes two rectangles. One chunk, the outer one, has the earliest and the latest of the
four pieces: the latest piece sees the inner chunk, and the inner chunk sees the earliest piece. For
the pair 0-2 (rows down, columns across; # is computed, . is hidden by causality or belongs to a
pair of a chunk with itself):

              0   2   5   7
        0     .   .   .   .
        2     #   .   .   .
        5     #   .   .   .
        7     .   #   #   .
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

# The smallest covers that a search found. A cover of P residues with k elements has
# k (k - 1) + 1 >= P.
COVERS = {
    1: (0,),
    2: (0, 1),
    3: (0, 1),
    4: (0, 1, 2),
    5: (0, 1, 2),
    6: (0, 1, 3),
    7: (0, 1, 3),
    8: (0, 1, 2, 4),
    9: (0, 1, 4, 8),
    10: (0, 3, 5, 9),
    11: (0, 6, 7, 9),
    12: (0, 1, 3, 7),
    13: (0, 1, 3, 9),
    14: (0, 1, 3, 7, 9),
    15: (0, 1, 9, 13, 14),
    16: (0, 1, 2, 5, 8),
    17: (0, 3, 4, 5, 14),
    18: (0, 1, 3, 6, 10),
    19: (0, 1, 11, 14, 18),
    20: (0, 3, 9, 10, 11, 16),
    21: (0, 1, 4, 14, 16),
    22: (0, 1, 3, 4, 7, 12),
    23: (0, 2, 11, 12, 14, 19),
    24: (0, 2, 5, 8, 19, 20),
    25: (0, 9, 14, 15, 17, 21),
    26: (0, 8, 14, 21, 24, 25),
    27: (0, 6, 7, 9, 11, 19),
    28: (0, 6, 7, 10, 21, 26),
    29: (0, 4, 7, 8, 10, 13, 25),
    30: (0, 8, 10, 19, 22, 23, 28),
    31: (0, 1, 4, 10, 12, 17),
    32: (0, 1, 2, 3, 7, 11, 19),
    33: (0, 4, 5, 12, 15, 24, 31),
    34: (0, 4, 6, 9, 26, 27, 28),
    35: (0, 1, 3, 7, 12, 20, 26),
    36: (0, 5, 7, 8, 14, 26, 30),
    37: (0, 5, 6, 8, 17, 21, 35),
    38: (0, 2, 6, 9, 25, 28, 29, 30),
    39: (0, 2, 9, 12, 20, 34, 35),
    40: (0, 1, 10, 15, 27, 30, 32, 34),
    41: (0, 7, 16, 18, 22, 27, 30, 31),
    42: (0, 8, 9, 13, 14, 30, 37, 40),
    43: (0, 1, 17, 19, 22, 24, 30, 34),
    44: (0, 8, 10, 11, 15, 16, 32, 41),
    45: (0, 13, 18, 24, 28, 36, 42, 43),
    46: (0, 4, 13, 23, 24, 29, 31, 43),
    47: (0, 4, 10, 25, 27, 34, 43, 46),
    48: (0, 7, 9, 12, 23, 27, 29, 47),
    49: (0, 5, 8, 17, 19, 23, 24, 44),
    50: (0, 7, 9, 19, 35, 36, 39, 44),
    51: (0, 10, 13, 17, 18, 24, 40, 49),
    52: (0, 2, 16, 20, 31, 39, 42, 47, 48),
    53: (0, 12, 16, 22, 25, 27, 32, 35, 36),
    54: (0, 7, 14, 19, 25, 41, 44, 45, 46),
    55: (0, 2, 17, 28, 33, 34, 35, 37, 47),
    56: (0, 9, 10, 20, 22, 25, 28, 45, 52),
    57: (0, 8, 11, 12, 17, 32, 39, 55),
    58: (0, 4, 16, 17, 18, 43, 47, 52, 55),
    59: (0, 3, 20, 22, 26, 38, 47, 51, 52),
    60: (0, 5, 9, 18, 24, 25, 35, 55, 57),
    61: (0, 7, 12, 15, 16, 26, 43, 53, 55),
    62: (0, 12, 32, 34, 37, 43, 51, 58, 61),
    63: (0, 4, 5, 7, 20, 26, 32, 49, 59),
    64: (0, 1, 12, 21, 25, 31, 47, 57, 62),
}


@dataclass(frozen=True)
class Part:
    """Consecutive pieces of a chunk, or one half of their tokens.

    Attributes:
        chunk: the chunk, which is also the number of the rank that owns it.
        start, end: the pieces ``start:end``, counted within the chunk.
        half: None for all tokens; 0 or 1 for the first or the second half of them, where two ranks
            share a pair of chunks.
    """

    chunk: int
    start: int
    end: int
    half: int | None = None


@dataclass(frozen=True)
class Task:
    """The scores of some rows against some columns.

    If ``rows == columns`` the scores are causal; otherwise every row sees every column.
    """

    rows: Part
    columns: Part


@dataclass(frozen=True)
class Round:
    """The tasks that become possible with one more chunk.

    Attributes:
        chunk: the chunk that arrives; in the first round the chunk that this rank owns.
        recipient: the rank that receives this rank's chunk in the same exchange; None in the first
            round, which needs no exchange.
        tasks: the tasks.
    """

    chunk: int
    recipient: int | None
    tasks: tuple[Task, ...]


def pieces_of(chunk: int, ranks: int) -> tuple[int, ...]:
    """Return the pieces of a chunk in the order of the sequence; a single rank has one piece."""
    return (0,) if ranks == 1 else (chunk, 2 * ranks - 1 - chunk)


@cache
def difference_cover(ranks: int) -> tuple[int, ...]:
    """Return a set that contains 0 and whose differences modulo ``ranks`` give every residue.

    For up to 64 ranks this is the smallest known cover. For more ranks it is {0..k-1} together with
    the multiples of k, about 2 sqrt(P) numbers, without those that are not needed.
    """
    if ranks in COVERS:
        return COVERS[ranks]
    step = 1
    while step * step < ranks:
        step += 1
    small = set(range(step))
    # Differences need to reach only P/2 in either direction.
    large = {multiple % ranks for multiple in range(0, ranks // 2 + 2 * step, step)}
    cover = small | large
    for element in sorted(cover - {0}):
        rest = cover - {element}
        if len({(a - b) % ranks for a, b in product(rest, repeat=2)}) == ranks:
            cover = rest
    return tuple(sorted(cover))


@cache
def schedule(ranks: int, rank: int) -> tuple[Round, ...]:
    """Return the rounds of one rank: first its own chunk, then each chunk that it fetches."""
    cover = difference_cover(ranks)
    tasks: list[list[Task]] = [[] for _ in cover]
    tasks[0] += _within(rank, ranks)
    for difference in range(1, ranks // 2 + 1):
        number, first, second = _pair_at(difference, cover, ranks)
        half = None
        if 2 * difference == ranks:
            # The rank at the distance P/2 has the same pair: the lower rank takes the first half.
            half = 0 if rank < ranks // 2 else 1
        tasks[number] += _between((rank + first) % ranks, (rank + second) % ranks, half)
    return tuple(
        Round((rank + offset) % ranks, (rank - offset) % ranks if offset else None, tuple(ready))
        for offset, ready in zip(cover, tasks, strict=True)
    )


def _pair_at(difference: int, cover: tuple[int, ...], ranks: int) -> tuple[int, int, int]:
    """Return (round, a, b): the first round after which both chunks of a pair at this difference
    are there, and the offsets of its chunks from the rank.
    """
    return min(
        (max(i, j), cover[i], cover[j])
        for i, j in product(range(len(cover)), repeat=2)
        if (cover[j] - cover[i]) % ranks == difference
    )


def _within(chunk: int, ranks: int) -> list[Task]:
    """Return the task of a chunk with itself: one triangle, because its pieces are in order."""
    whole_chunk = Part(chunk, 0, len(pieces_of(chunk, ranks)))
    return [Task(whole_chunk, whole_chunk)]


def _between(x: int, y: int, half: int | None) -> list[Task]:
    """Return the two tasks of a pair of chunks; see the drawing above."""
    outer, inner = min(x, y), max(x, y)
    return [
        Task(Part(outer, 1, 2, half), Part(inner, 0, 2)),
        Task(Part(inner, 0, 2, half), Part(outer, 0, 1)),
    ]
