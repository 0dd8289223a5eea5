"""The picture of an evaluation: a PNG file with a panel for everything that was measured."""

from __future__ import annotations

import math

import pytest
from matplotlib import pyplot

from megalard.evaluation.plots import draw, short_length
from tests.evaluation.results import RESTORATION, comparison_entries, restoration_entries


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which stay open until the test ends."""
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    pyplot.close("all")


def titles(figure) -> list[str]:
    """Return the titles of the panels that show something."""
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_the_picture_is_a_png(tmp_path):
    draw(tmp_path / "plot.png", restoration_entries(), RESTORATION)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    # Whatever the name of the file; it is written under another name first.
    draw(tmp_path / ".plot.partial", restoration_entries(), RESTORATION)
    assert (tmp_path / ".plot.partial").read_bytes().startswith(b"\x89PNG")


def test_a_restoration_shows_perplexity_with_the_native_window(figures, tmp_path):
    draw(tmp_path / "plot.png", restoration_entries(), RESTORATION)
    (figure,) = figures
    assert titles(figure) == ["Perplexity by context length", "Distance from the teacher"]
    curves = {line.get_label(): line for line in figure.axes[0].lines}
    assert [*curves] == ["teacher", "scaled", "restored", "native window M = 64"]
    assert list(curves["teacher"].get_xdata()) == [32, 64, 128]
    perplexities = [math.exp(loss) for loss in (1.4, 1.6, 3.0)]
    assert list(curves["restored"].get_ydata()) == pytest.approx(perplexities)
    # KL is drawn where there is one, up to the native window.
    assert list(figure.axes[1].lines[2].get_ydata()) == [0.5, 0.5]
    # The teacher is not compared with itself.
    assert list(figure.axes[1].lines[0].get_xdata()) == []
    assert figure.axes[0].get_yscale() == "log"


def test_a_comparison_shows_positions_tasks_and_depths(figures, tmp_path):
    draw(tmp_path / "plot.png", comparison_entries())
    (figure,) = figures
    assert titles(figure) == [
        "Perplexity by context length",
        "Loss by position",
        "Distance from the teacher",
        "passkey",
        "passkey: a",
        "passkey: b",
    ]
    positions = figure.axes[1].lines[1]
    assert (list(positions.get_xdata()), list(positions.get_ydata())) == ([16, 128], [4.0, 2.0])
    assert figure.axes[1].get_yscale() == "linear"


def test_lengths_are_written_in_thousands_where_that_is_exact():
    assert [short_length(n) for n in (512, 1000, 1024, 131072)] == ["512", "1000", "1K", "128K"]
