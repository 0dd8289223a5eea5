"""Skipped positions: the student reads a short block at positions all over its window.

A block of n tokens is cut into head, middle and tail. The head is placed at the start of the
window, the tail at its end, and the middle somewhere between, so that a short text contains the
distances of a long one (CREAM, arXiv 2406.07138). LongReD (arXiv 2502.07365) uses skipped positions
for its short-to-long distillation, with both ways of placing the middle.
"""

from __future__ import annotations

import math

import numpy as np

_SIGMA = 5.0


def skipped_positions(length: int, window: int, middle: str, seed: tuple[int, ...]) -> np.ndarray:
    """Return the position of each place of a block, int64 [length].

    The positions increase strictly from 0 to window - 1. Let f = window / length. Head and tail
    have a third of the block each, or 4 f tokens each; both cases have probability 1/2. With
    ``uniform`` the last token of the middle is uniform over all possible places. With ``gaussian``,
    as in CREAM, it is uniform over the places in a window of alpha / 2 blocks, where alpha in
    2 ... 2 f is drawn from a Gaussian of mean 1 + f and standard deviation 5 that is truncated at
    both ends.

    Args:
        length: the number of tokens of the block, at least 2.
        window: the student's window, at least ``length``.
        middle: ``gaussian`` or ``uniform``.
        seed: non-negative numbers that determine the draws.
    """
    draws = _uniform(seed, 3)
    factor = window / length
    head = length // 3 if draws[0] < 0.5 else min(round(4 * factor), length // 3)
    size = length - 2 * head
    first_end, last_end = length - head - 1, window - head - 1
    if middle == "gaussian":
        half = _truncated_gaussian(draws[1], 1 + factor, _SIGMA, 2, 2 * factor) / 2
        last_end = min(last_end, math.floor(half * length) - head - 1)
        first_end = min(math.floor(head + (size - 1) * half), last_end)
    end = first_end + math.floor(draws[2] * (last_end - first_end + 1))
    return np.concatenate(
        [
            np.arange(head),
            np.arange(end - size + 1, end + 1),
            np.arange(window - head, window),
        ]
    )


def _uniform(seed: tuple[int, ...], count: int) -> np.ndarray:
    # The raw stream is the same in every release of numpy; see data.sampler.
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def _truncated_gaussian(u: float, mean: float, sigma: float, low: float, high: float) -> int:
    """Return an integer in [low, high]: the quantile ``u`` of a truncated Gaussian."""

    def cumulative(x: float) -> float:
        return 0.5 * (1 + math.erf((x - mean) / (sigma * math.sqrt(2))))

    values = np.arange(math.floor(low), math.floor(high) + 1)
    edges = np.array([cumulative(x) for x in [*values, high]])
    return int(values[np.searchsorted(edges[1:-1], edges[0] + u * (edges[-1] - edges[0]))])
