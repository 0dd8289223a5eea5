"""The schedule as a pure function: what is computed where, and what travels."""

from __future__ import annotations

import numpy as np
import pytest

from megalard.parallel.context.schedule import (
    difference_cover,
    pieces_of,
    schedule,
)

RANKS = range(1, 65)
# Fetches (cover size less one) of the design for these sizes
FETCHES = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2, 8: 3, 12: 3, 13: 3, 16: 4, 32: 6}


def places(part, ranks, length):
    """Where a part's tokens stand in the sequence, for pieces of ``length``."""
    pieces = pieces_of(part.chunk, ranks)[part.first : part.last]
    tokens = [piece * length + i for piece in pieces for i in range(length)]
    middle = (len(tokens) + 1) // 2
    return {None: tokens, 0: tokens[:middle], 1: tokens[middle:]}[part.half]


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
    assert all(stage.tasks for stage in schedule(ranks, 0)), "a chunk is fetched in vain"


@pytest.mark.parametrize("ranks", RANKS)
def test_every_pair_once_and_equal_work(ranks):
    length = 3  # odd, so that halves differ
    tokens = length * (1 if ranks == 1 else 2 * ranks)
    seen, work = np.zeros((tokens, tokens), dtype=int), []
    for rank in range(ranks):
        before = seen.sum()
        for stage in schedule(ranks, rank):
            for task in stage.tasks:
                rows, columns = (
                    np.array(places(part, ranks, length)) for part in (task.rows, task.columns)
                )
                allowed = columns[None, :] <= rows[:, None]
                assert allowed.all() or task.rows == task.columns
                seen[np.ix_(rows, columns)] += allowed
        work.append(seen.sum() - before)
    assert (seen == np.tri(tokens, dtype=int)).all()
    # the shared rows are those of one piece and of two; of an odd piece one half has a row more
    assert max(work) - min(work) <= 2 * length


@pytest.mark.parametrize("ranks", RANKS)
def test_tasks_wait_only_for_chunks_that_are_there(ranks):
    for rank in range(ranks):
        here = set()
        for stage in schedule(ranks, rank):
            here.add(stage.chunk)
            for task in stage.tasks:
                assert {task.rows.chunk, task.columns.chunk} <= here
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
