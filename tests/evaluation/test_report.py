"""The report of an evaluation: table, JSON file and plot say what was measured."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from megalard.evaluation.measure import Measurement
from megalard.evaluation.report import (
    ModelResult,
    gap_restored,
    plot,
    print_table,
    read_json,
    write_json,
)

NATIVE = 64


def result(name: str, short: float, long: float, tokens: int = 0, **agreement) -> ModelResult:
    by_length = {
        32: Measurement(short - 0.1, **agreement),
        64: Measurement(short + 0.1, **agreement),
        128: Measurement(long),
    }
    return ModelResult(name, tokens, by_length)


@pytest.fixture
def results():
    return [
        result("teacher", 1.0, 5.0),
        result("scaled", 3.0, 4.0, kl=2.0, agreement=0.25),
        result("restored", 1.5, 3.0, 4096, kl=0.5, agreement=0.75),
    ]


def test_gap_restored_is_the_share_of_the_short_text_loss_won_back(results):
    teacher, scaled, restored = results
    assert gap_restored(restored, teacher, scaled, NATIVE) == pytest.approx(0.75)
    assert gap_restored(teacher, teacher, scaled, NATIVE) == pytest.approx(1)
    assert gap_restored(scaled, teacher, scaled, NATIVE) == pytest.approx(0)
    worse = result("worse", 4.0, 4.0)
    assert gap_restored(worse, teacher, scaled, NATIVE) == pytest.approx(-0.5)


def test_there_is_no_share_where_there_is_no_gap(results):
    teacher, scaled, restored = results
    assert gap_restored(restored, scaled, teacher, NATIVE) is None
    assert gap_restored(restored, teacher, teacher, NATIVE) is None
    # no length within the native window was measured
    assert gap_restored(restored, teacher, scaled, 16) is None


def test_short_means_leave_out_what_was_not_measured(results):
    teacher, scaled, _ = results
    assert scaled.short_loss(NATIVE) == pytest.approx(3.0)
    assert scaled.short_mean("kl", NATIVE) == 2.0
    assert teacher.short_mean("kl", NATIVE) is None
    assert math.isnan(teacher.short_loss(16))


def test_json_reads_back_as_written(results, tmp_path):
    path = tmp_path / "evaluation.json"
    write_json(path, results, NATIVE, 2.0)
    assert read_json(path) == (results, NATIVE, 2.0)
    content = json.loads(path.read_text())
    restored = content["models"][2]
    assert restored["gap_restored"] == pytest.approx(0.75)
    assert restored["by_length"]["128"]["perplexity"] == pytest.approx(math.exp(3.0))


def test_the_table_holds_every_figure(results):
    console = Console(width=140, record=True, file=io.StringIO())
    print_table(results, NATIVE, console)
    lines = {
        line.split("│")[1].strip(): line
        for line in console.export_text().splitlines()
        if "│" in line
    }
    cells = [cell.strip() for cell in lines["restored"].split("│")[2:-1]]
    perplexities = [f"{math.exp(loss):.3f}" for loss in (1.4, 1.6, 3.0)]
    assert cells == [*perplexities, "0.750", "0.5000", "0.750", "4,096"]
    assert lines["teacher"].split("│")[5].strip() == ""


def test_the_plot_is_a_png(results, tmp_path):
    plot(tmp_path / "plot.png", results, NATIVE)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
