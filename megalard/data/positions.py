"""Skipped positions: short text read by the student over the whole of its window.

A block of n tokens is cut into head, middle and tail. The head stands at the start of the window,
the tail at its end, and the middle somewhere between, so that the distances of a long text occur
in a short one (CREAM, arXiv 2406.07138; LongReD, arXiv 2502.07365, uses it as
short-to-long distillation and knows both ways to place the middle).
"""

import math

import numpy as np

_SIGMA = 5.0


def skipped_positions(length: int, window: int, middle: str, seed: tuple[int, ...]) -> np.ndarray:
    """The positions of a block's places, int64 [length], strictly rising from 0 to window - 1.

    Head and tail have a third of the block or 4 f tokens each, with equal chance, where
    f = window / length. The last token of the middle is uniform over all places, or, as in CREAM,
    over those of a window of alpha / 2 blocks, alpha in 2 ... 2 f being drawn from a Gaussian with
    mean 1 + f and deviation 5, cut at both ends.

    Args:
        length: n, at least 2.
        window: the student's, at least ``length``.
        middle: gaussian or uniform.
        seed: what the draws depend on, non-negative numbers.
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
    # the raw stream is the same in every release of numpy; see data.sampler
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def _truncated_gaussian(u: float, mean: float, sigma: float, low: float, high: float) -> int:
    """An integer in [low, high] by the inverse of the cut Gaussian's distribution function."""

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - mean) / (sigma * math.sqrt(2))))

    values = np.arange(math.floor(low), math.floor(high) + 1)
    edges = np.array([below(x) for x in [*values, high]])
    return int(values[np.searchsorted(edges[1:-1], edges[0] + u * (edges[-1] - edges[0]))])
