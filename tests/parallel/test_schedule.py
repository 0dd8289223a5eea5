"""The schedule as a pure function: what is computed where, and what travels."""

from __future__ import annotations

import pytest

from megalard.parallel.schedule import (
    chunk_of,
    difference_cover,
    pieces_of,
    schedule,
)

RANKS = range(1, 65)
# Fetches (cover size less one) of the design for these sizes
FETCHES = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2, 8: 3, 12: 3, 13: 3, 16: 4, 32: 6}


def row_parts(task, length):
    """The task's rows within its piece, and whether its pairs are a triangle."""
    middle = (length + 1) // 2
    rows = {None: range(length), 0: range(middle), 1: range(middle, length)}[task.half]
    return rows, task.rows == task.columns


@pytest.mark.parametrize("ranks", RANKS)
def test_cover_gives_every_difference(ranks):
    cover = difference_cover(ranks)
    assert cover[0] == 0 and len(set(cover)) == len(cover)
    assert {(a - b) % ranks for a in cover for b in cover} == set(range(ranks))
    assert len(cover) - 1 == FETCHES.get(ranks, len(cover) - 1)
    # k elements have k(k-1) differences besides 0; ours need at most one element more
    fewest = next(k for k in range(1, ranks + 1) if k * (k - 1) + 1 >= ranks)
    assert len(cover) <= fewest + 1


@pytest.mark.parametrize("ranks", [65, 100, 129, 256, 1000])
def test_a_cover_that_is_not_tabulated_is_computed(ranks):
    cover = difference_cover(ranks)
    assert {(a - b) % ranks for a in cover for b in cover} == set(range(ranks))
    assert len(cover) <= 2 * ranks**0.5 + 2


@pytest.mark.parametrize("ranks", RANKS)
def test_every_pair_once_and_equal_work(ranks):
    length = 3  # odd, so that halves differ
    seen, work = set(), []
    for rank in range(ranks):
        pairs = 0
        for stage in schedule(ranks, rank):
            for task in stage.tasks:
                rows, triangle = row_parts(task, length)
                for row in rows:
                    key = (task.rows, row, task.columns)
                    assert key not in seen
                    seen.add(key)
                    pairs += row + 1 if triangle else length
        work.append(pairs)
    pieces = 1 if ranks == 1 else 2 * ranks
    assert len(seen) == length * pieces * (pieces + 1) // 2
    # a shared pair of chunks has four pairs of pieces, each with one row more on one side
    assert max(work) - min(work) <= 4 * length


@pytest.mark.parametrize("ranks", RANKS)
def test_tasks_wait_only_for_chunks_that_are_there(ranks):
    for rank in range(ranks):
        here = set()
        for stage in schedule(ranks, rank):
            here.add(stage.chunk)
            for task in stage.tasks:
                assert {chunk_of(task.rows, ranks), chunk_of(task.columns, ranks)} <= here
                assert task.columns <= task.rows
        assert len(here) == len(difference_cover(ranks))


@pytest.mark.parametrize("ranks", RANKS)
def test_sends_meet_receives(ranks):
    """In every stage rank r sends to the one rank that expects r's chunk."""
    for number in range(1, len(difference_cover(ranks))):
        for rank in range(ranks):
            to = schedule(ranks, rank)[number].to
            assert schedule(ranks, to)[number].chunk == rank


@pytest.mark.parametrize("ranks", RANKS)
def test_pieces_are_owned_once(ranks):
    pieces = [piece for chunk in range(ranks) for piece in pieces_of(chunk, ranks)]
    assert sorted(pieces) == list(range(len(pieces)))
    assert all(piece in pieces_of(chunk_of(piece, ranks), ranks) for piece in pieces)
