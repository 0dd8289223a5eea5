"""Intervals of positions, for the loss by position (``measure.measure_by_position``)."""

from __future__ import annotations

_FIRST = 16


def doubling_edges(length: int) -> list[int]:
    """1, 16, 32, 64, ... and ``length``: as many intervals as a window has octaves.

    The first sixteen positions, where there is next to no context, are one interval.
    """
    edges, edge = [1], _FIRST
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def equal_edges(length: int, count: int) -> list[int]:
    """``count`` intervals of equal length, up to rounding, from 1 to ``length``."""
    assert 1 <= count < length
    return [1, *(round(length * i / count) for i in range(1, count)), length]
