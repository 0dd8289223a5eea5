"""The schedule as a pure function: what is computed where, and what is sent to whom."""

from __future__ import annotations

import numpy as np
import pytest

from megalard.parallel.context.schedule import (
    COVERS,
    Part,
    Task,
    difference_cover,
    pieces_of,
    schedule,
)

RANKS = range(1, 65)
# The number of chunks that a rank fetches, one less than the size of the cover.
FETCHES = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2, 8: 3, 12: 3, 13: 3, 16: 4, 32: 6}


def places(part: Part, ranks: int, length: int) -> list[int]:
    """Return the places of a part's tokens in the sequence, for pieces of ``length`` tokens."""
    pieces = pieces_of(part.chunk, ranks)[part.start : part.end]
    tokens = [piece * length + i for piece in pieces for i in range(length)]
    middle = (len(tokens) + 1) // 2
    return {None: tokens, 0: tokens[:middle], 1: tokens[middle:]}[part.half]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_cover_gives_every_difference(ranks):
    cover = difference_cover(ranks)
    assert cover[0] == 0 and len(set(cover)) == len(cover)
    assert {(a - b) % ranks for a in cover for b in cover} == set(range(ranks))
    assert len(cover) - 1 == FETCHES.get(ranks, len(cover) - 1)
    # k elements have k (k - 1) differences other than 0. The cover has at most one element more
    # than the smallest k for which these are enough.
    fewest = next(k for k in range(1, ranks + 1) if k * (k - 1) + 1 >= ranks)
    assert len(cover) <= fewest + 1


@pytest.mark.parametrize("ranks", [65, 100, 129, 256, 1000])
def test_a_cover_that_is_not_in_the_table_is_computed(ranks):
    assert ranks not in COVERS
    cover = difference_cover(ranks)
    assert {(a - b) % ranks for a in cover for b in cover} == set(range(ranks))
    assert len(cover) <= 2 * ranks**0.5 + 2
    assert all(round_.tasks for round_ in schedule(ranks, 0)), "a chunk is fetched for nothing"


def test_the_schedule_of_rank_0_of_4_is_as_drawn():
    """Chunks 0, 1 and 2 of the pieces 0 7, 1 6 and 2 5; half of the pair 0-2."""
    own, one, two = schedule(4, 0)
    assert [(r.chunk, r.recipient) for r in (own, one, two)] == [(0, None), (1, 3), (2, 2)]
    assert own.tasks == (Task(Part(0, 0, 2), Part(0, 0, 2)),)
    assert one.tasks == (
        Task(Part(0, 1, 2), Part(1, 0, 2)),
        Task(Part(1, 0, 2), Part(0, 0, 1)),
    )
    assert two.tasks == (
        Task(Part(0, 1, 2, 0), Part(2, 0, 2)),
        Task(Part(2, 0, 2, 0), Part(0, 0, 1)),
    )


@pytest.mark.parametrize("ranks", RANKS)
def test_every_pair_is_computed_once_and_the_work_is_equal(ranks):
    length = 3  # an uneven number, so that the two halves of a piece differ
    tokens = length * (1 if ranks == 1 else 2 * ranks)
    times, work = np.zeros((tokens, tokens), dtype=int), []
    for rank in range(ranks):
        before = times.sum()
        for round_ in schedule(ranks, rank):
            for task in round_.tasks:
                rows, columns = (
                    np.array(places(part, ranks, length)) for part in (task.rows, task.columns)
                )
                allowed = columns[None, :] <= rows[:, None]
                assert allowed.all() or task.rows == task.columns
                times[np.ix_(rows, columns)] += allowed
        work.append(times.sum() - before)
    assert (times == np.tri(tokens, dtype=int)).all()
    # Two ranks share the rows of one piece and of two pieces. One half of an uneven piece has a
    # row more than the other.
    assert max(work) - min(work) <= 2 * length


@pytest.mark.parametrize("ranks", RANKS)
def test_tasks_read_only_chunks_that_have_arrived(ranks):
    for rank in range(ranks):
        arrived = set()
        for round_ in schedule(ranks, rank):
            arrived.add(round_.chunk)
            for task in round_.tasks:
                assert {task.rows.chunk, task.columns.chunk} <= arrived
        assert len(arrived) == len(difference_cover(ranks))


@pytest.mark.parametrize("ranks", RANKS)
def test_every_send_has_its_receive(ranks):
    """In every round a rank sends its chunk to the one rank that expects it."""
    for number in range(1, len(difference_cover(ranks))):
        for rank in range(ranks):
            recipient = schedule(ranks, rank)[number].recipient
            assert schedule(ranks, recipient)[number].chunk == rank


@pytest.mark.parametrize("ranks", RANKS)
def test_every_piece_has_one_owner(ranks):
    pieces = [piece for chunk in range(ranks) for piece in pieces_of(chunk, ranks)]
    assert sorted(pieces) == list(range(len(pieces)))
