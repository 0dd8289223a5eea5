"""Skipped positions: short blocks at positions all over the student's window."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from megalard.data import positions as positions_module
from megalard.data.blocks import PackedBlocks
from megalard.data.loader import BatchLoader
from megalard.data.positions import _truncated_gaussian, skipped_positions

SIZES = [(512, 4096), (8192, 32768), (24, 96), (2, 16), (3, 9), (10, 10), (16, 40), (7, 1000)]


@pytest.mark.parametrize("middle", ["gaussian", "uniform"])
@pytest.mark.parametrize(("length", "window"), SIZES)
def test_positions_increase_from_the_start_to_the_end_of_the_window(length, window, middle):
    for draw in range(200):
        positions = skipped_positions(length, window, middle, (3, draw))
        assert positions.dtype == np.int64 and positions.shape == (length,)
        assert (np.diff(positions) > 0).all()
        assert positions[0] >= 0 and positions[-1] < window
        # Three contiguous parts, of which the outer two have the same length.
        jumps = np.flatnonzero(np.diff(positions) > 1) + 1
        assert len(jumps) <= 2
        if len(jumps) == 2:
            assert jumps[0] == length - jumps[1]
            assert positions[0] == 0 and positions[-1] == window - 1


def test_head_and_tail_have_a_third_of_the_block_or_four_tokens_per_factor():
    heads = [
        int(np.flatnonzero(np.diff(skipped_positions(512, 4096, "uniform", (0, i))) > 1)[0]) + 1
        for i in range(300)
    ]
    # The middle may touch the head, which then looks longer. This is rare.
    common = [head for head in heads if head in (170, 32)]
    assert len(common) > 290
    # A fair coin: 150 of 300, with a standard deviation of 8.7.
    assert 100 < common.count(170) < 200


def simulated_ends(middle: str, length: int, factor: int, draws: int) -> np.ndarray:
    """Return the last token of the middle as the authors of CREAM place it, with other draws."""
    random, ends = np.random.default_rng(0), []
    grid = np.linspace(2, 2 * factor, 1000)
    cdf = [0.5 * (1 + math.erf((x - 1 - factor) / (5 * math.sqrt(2)))) for x in grid]
    for _ in range(draws):
        head = random.choice([length // 3, 4 * factor])
        first, last = length - head - 1, factor * length - head - 1
        if middle == "gaussian":
            half = int(np.interp(random.uniform(cdf[0], cdf[-1]), cdf, grid)) / 2
            first = int(head + (length - 2 * head - 1) * half)
            last = int(half * length - head - 1)
        ends.append(random.integers(first, last + 1))
    return np.array(ends)


@pytest.mark.parametrize("middle", ["gaussian", "uniform"])
def test_the_middle_is_placed_as_in_cream(middle):
    ours, draws = [], 4000
    for i in range(draws):
        row = skipped_positions(512, 4096, middle, (1, i))
        head = 170 if row[169] == 169 else 32
        ours.append(row[512 - head - 1])
    theirs = simulated_ends(middle, 512, 8, draws)
    # Four standard errors of a difference of means.
    error = np.hypot(np.std(ours), np.std(theirs)) / draws**0.5
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * error
    assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.06)


@pytest.mark.parametrize("high", [16.0, 6.4])
def test_the_quantiles_are_those_of_a_truncated_gaussian(high):
    """``v`` has the mass from v to v + 1, and the last integer what is left up to ``high``."""
    gaussian = NormalDist(5.0, 3.0)
    below = [gaussian.cdf(v) for v in range(2, math.floor(high) + 1)] + [gaussian.cdf(high)]
    for u in np.linspace(0.0005, 0.9995, 1000):
        mass = below[0] + u * (below[-1] - below[0])
        expected = next(v for v, end in enumerate(below[1:], 2) if mass <= end)
        assert _truncated_gaussian(u, 5.0, 3.0, 2, high) == expected


def test_the_positions_of_a_row_do_not_depend_on_the_rank(make_store):
    blocks = PackedBlocks(make_store(np.full(40, 30).tolist()), 16)
    options = {"seed": 5, "global_batch": 8, "window": 128, "positions": "skip-gaussian"}

    def rows(**more):
        with BatchLoader(blocks, **options, **more) as loader:
            return [
                (row.tolist(), batch.position_bs[i].tolist())
                for batch in loader.step(3)
                for i, row in enumerate(batch.student_position_bs)
            ]

    whole = rows(micro_batch=8)
    assert len({tuple(student) for student, _ in whole}) > 4
    assert all(student != teacher for student, teacher in whole)
    halves = [rows(micro_batch=2, dp_size=2, dp_rank=rank) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(whole)


@pytest.mark.parametrize(("middle", "ends"), [("gaussian", [19, 7, 7]), ("uniform", [15, 36, 14])])
def test_the_positions_are_the_same_in_every_release(middle, ends):
    """A run that was saved before an upgrade goes on with them: do not update these numbers."""
    for draw, end in enumerate(ends):
        positions = skipped_positions(12, 48, middle, (7, 3, draw)).tolist()
        assert positions == [*range(4), *range(end - 3, end + 1), *range(44, 48)]


@pytest.mark.parametrize(("draw", "last"), [(0.0, 10), (0.999, 19)])
def test_the_middle_lies_between_the_ends_that_alpha_gives(draw, last, monkeypatch):
    """The first and the last possible end of a middle of four tokens, by formula for alpha = 4.

    They are 4 + 3 * 4/2 = 10 and 4/2 * 12 - 4 - 1 = 19.
    """
    monkeypatch.setattr(positions_module, "_uniform", lambda seed, count: [0.0, 0.5, draw])
    monkeypatch.setattr(positions_module, "_truncated_gaussian", lambda *words: 4)
    positions = skipped_positions(12, 48, "gaussian", (0,)).tolist()
    assert positions == [*range(4), *range(last - 3, last + 1), *range(44, 48)]
