"""Estimates against every step that was measured on GPUs, and the tables of the page."""

from __future__ import annotations

import pytest

from megalard.estimate.gpus import TIME_ERROR
from megalard.estimate.memory import MEMORY_ERROR
from tools.bench import planned
from tools.bench.planned_state import difference, state_rows
from tools.bench.planned_steps import Row, bench_rows, study_rows


@pytest.fixture(scope="module")
def steps() -> list[Row]:
    return bench_rows()


@pytest.fixture(scope="module")
def studies() -> list[Row]:
    return study_rows()


def test_memory_is_within_the_stated_error(steps, studies):
    assert (MEMORY_ERROR, len(steps) >= 15, len(studies) >= 12) == (0.05, True, True)
    off = {row.name: row.memory_difference for row in [*steps, *studies]}
    assert all(abs(difference) <= MEMORY_ERROR for difference in off.values()), off


def test_time_is_within_the_stated_error(steps):
    assert TIME_ERROR == 0.15
    off = {(row.name, row.tokens): row.time_difference for row in steps}
    assert all(abs(difference) <= TIME_ERROR for difference in off.values()), off


def test_divided_state_is_within_the_stated_errors():
    rows = state_rows()
    assert {(row.optimizer, row.gpus) for row in rows} >= {("whole", 1), ("divided", 4)}
    off = {
        (row.name, row.optimizer, kind): difference(pair)
        for row in rows
        for kind, pair in (("between", row.between), ("peak", row.peak))
    }
    assert len(off) >= 14 and all(abs(value) <= MEMORY_ERROR for value in off.values()), off
    times = {
        (row.name, row.optimizer, kind): difference(pair)
        for row in rows
        for kind, pair in (("update", row.update), ("passes", row.passes))
        if pair is not None
    }
    assert len(times) >= 5 and all(abs(value) <= TIME_ERROR for value in times.values()), times


def test_the_tables_of_the_page_are_new():
    text = planned.PAGE.read_text(encoding="utf-8")
    assert planned.renewed(text) == text, "run python -m tools.bench.planned --write"
    for name in planned.tables():
        assert f"<!-- table: {name} -->" in text
