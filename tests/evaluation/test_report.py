"""The report of an evaluation: tables and a JSON file with every figure."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from megalard.errors import UserError
from megalard.evaluation.measure import Measurement
from megalard.evaluation.report import Entry, Restoration, print_tables, read_json, write_json
from megalard.evaluation.suite import Results
from tests.evaluation.results import (
    NATIVE,
    RESTORATION,
    comparison_entries,
    entry,
    restoration_entries,
)


def printed(entries, restoration=None) -> list[list[str]]:
    """Return the cells of every printed row; the first row of a table has its headings."""
    console = Console(width=140, record=True, file=io.StringIO())
    print_tables(entries, restoration, console)
    text = console.export_text().replace("┃", "│")
    rows = (line for line in text.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows]


def test_the_restored_gap_is_the_share_of_the_short_text_loss_won_back():
    entries = restoration_entries()
    shares = [RESTORATION.gap_restored(model, entries) for model in entries]
    assert shares == pytest.approx([1.0, 0.0, 0.75])
    worse = entry("worse", 4.0, 4.0)
    assert RESTORATION.gap_restored(worse, entries) == pytest.approx(-0.5)


def test_positions_are_counted_from_one_to_the_end_of_the_window():
    console = Console(width=140, record=True, file=io.StringIO())
    print_tables(comparison_entries(), None, console)
    text = console.export_text()
    head = text[text.index("windows of 128 tokens") :].splitlines()[2]
    assert [cell.strip() for cell in head.split("┃")[1:-1]] == ["model", "1-15", "16-127"]


def test_there_is_no_share_where_there_is_no_gap():
    teacher, scaled, restored = restoration_entries()
    assert RESTORATION.gap_restored(restored, [scaled, teacher]) is None
    assert RESTORATION.gap_restored(restored, [teacher, teacher]) is None
    # No length within the native window was measured.
    assert Restoration(16, 2.0).gap_restored(restored, [teacher, scaled]) is None


def test_short_means_leave_out_what_was_not_measured():
    teacher, scaled, _ = restoration_entries()
    assert scaled.short_loss(NATIVE) == pytest.approx(3.0)
    assert scaled.short_mean("kl", NATIVE) == 2.0
    assert teacher.short_mean("kl", NATIVE) is None
    assert math.isnan(teacher.short_loss(16))


def test_a_restoration_reads_back_as_written(tmp_path):
    path, entries = tmp_path / "evaluation.json", restoration_entries()
    write_json(path, entries, {"text": ["x"]}, RESTORATION)
    assert read_json(path) == (entries, RESTORATION)
    content = json.loads(path.read_text())
    assert (content["native_context"], content["factor"]) == (NATIVE, 2.0)
    assert content["settings"] == {"text": ["x"]}
    restored = content["models"][2]
    assert restored["gap_restored"] == pytest.approx(0.75)
    assert restored["by_length"]["128"]["perplexity"] == pytest.approx(math.exp(3.0))


def test_a_comparison_reads_back_as_written(tmp_path):
    path, entries = tmp_path / "comparison.json", comparison_entries()
    write_json(path, entries, {})
    assert read_json(path) == (entries, None)
    model = json.loads(path.read_text())["models"][1]
    assert (model["directory"], model["kind"], model["window"]) == ("/models/b", "huggingface", 128)
    assert "gap_restored" not in model
    intervals = [(part["first"], part["last"], part["loss"]) for part in model["by_position"]]
    assert intervals == [(1, 15, 4.0), (16, 127, 2.0)]
    assert model["tasks"]["passkey"]["64"]["by_depth"] == {"0.0": 1.0, "1.0": 0.0}


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ((), [], "list indices"),
        (("models",), None, "it has None where list is needed"),
        (("models",), [], "it has 0 models"),
        (("native_context",), "64", "it has '64' where int is needed"),
        (("factor",), [2], r"it has \[2\] where a number is needed"),
        (("models", 0, "name"), 7, "it has 7 where str is needed"),
        (("models", 0, "by_length"), {}, "measured at different lengths"),
        (("models", 2, "by_length", "64"), {}, "it lacks 'kl'"),
        (("models", 1, "by_length", "64", "loss"), "3", "it has '3' where a number is needed"),
        (("models", 1, "by_length", "64", "kl"), True, "it has True where a number is needed"),
        (("models", 1, "by_length", "64", "loss"), 10**400, "too large"),
        (("models", 1, "tokens"), 1.5, "it has 1.5 where int is needed"),
    ],
)
def test_a_damaged_evaluation_is_refused_in_one_sentence(place, value, reason, tmp_path):
    path = tmp_path / "evaluation.json"
    write_json(path, restoration_entries(), {}, RESTORATION)
    content = holder = {"": json.loads(path.read_text())}
    *keys, last = ("", *place)
    for key in keys:
        holder = holder[key]
    holder[last] = value
    path.write_text(json.dumps(content[""]))
    with pytest.raises(UserError, match=f"{path} is damaged or is not an evaluation .*{reason}"):
        read_json(path)


def test_an_evaluation_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "evaluation.json"
    for text in ("", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="is damaged or is not an evaluation"):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, [Entry("broken", Results({8: Measurement(math.nan)}))], {})
    assert json.loads(path.read_text())["models"][0]["by_length"]["8"]["loss"] is None
    ((broken,), _) = read_json(path)
    assert math.isnan(broken.results.by_length[8].loss)


def test_the_table_of_a_restoration_has_every_figure():
    rows = {row[0]: row[1:] for row in printed(restoration_entries(), RESTORATION)}
    headings = ["gap restored", "KL to teacher", "same top-1", "tokens"]
    assert rows["model"] == [*map(str, restoration_entries()[0].results.by_length), *headings]
    perplexities = [f"{math.exp(loss):.3f}" for loss in (1.4, 1.6, 3.0)]
    assert rows["restored"] == [*perplexities, "0.750", "0.5000", "0.750", "4,096"]
    # The share is of the restored students alone.
    assert rows["teacher"][3:] == ["", "", "", ""]
    assert rows["scaled"][3:] == ["", "2.0000", "0.250", ""]


def test_the_tables_of_a_comparison_have_every_figure():
    rows = printed(comparison_entries())
    assert [row for row in rows if row[0] == "b"] == [
        ["b", *(f"{math.exp(loss):.3f}" for loss in (2.1, 2.3, 2.0))],
        ["b", "", ""],
        ["b", "4.000", "2.000"],
    ]
    assert ["a", "0.2500 / 0.500", "0.2500 / 0.500"] in rows
    assert ["passkey", "b", "0.50 (0.75)", "0.50 (0.75)"] in rows
