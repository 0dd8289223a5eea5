"""The report: tables, JSON and plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import one_error, tool, user_error
from tests.tools.study.measured import baselines, final
from tools.study.tables import write_report

restoration = tool("study.restoration")
FIGURES = Path(__file__).parents[3] / "docs" / "figures" / "restoration"


@pytest.fixture
def results():
    finals = [final("linearard", 1, [3.0, 2.5, 2.1]), final("linearard", 2, [3.0, 2.5, 2.3])]
    timing = {
        "kind": "timing",
        "method": "linearard",
        "rope": "linear",
        "rate": 0.1,
        "tokens_per_step": 4096,
        "seconds_per_step": 0.05,
        "peak_memory": 2**30,
    }
    return [*baselines(), *finals, timing]


def test_a_report_has_tables_numbers_and_plots(results, tmp_path, capsys):
    write_report(tmp_path / "report", results, "python")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {
        "restoration-tables.md",
        "restoration.json",
        "restoration-tokens.png",
        "restoration-positions.png",
        "restoration-passkey.png",
    }
    tables = (tmp_path / "report" / "restoration-tables.md").read_text()
    assert tables in capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines() if line[:1] == "|"]
    short = next(row for row in rows if row[0] == "PI, LinearARD (published)")
    assert short[1:5] == ["250K", "0.1", "0.900 ± 0.050", "0.800 ± 0.000"]
    scaled = next(row for row in rows if row[0] == "PI, not restored")
    assert scaled[1:6] == ["0", "", "0", "1.0000", "0"]
    cost = next(row for row in rows if row[0] == "LinearARD (published)")
    assert cost[1:] == ["4,096", "50.0", "81,920", "1.00", "3.1"]
    entry = json.loads((tmp_path / "report" / "restoration.json").read_text())["linear/linearard"]
    assert entry["out_of_domain"]["restored"]["mean"] == pytest.approx(0.9)
    assert [tokens for tokens, _ in entry["in_domain"]["curve"]] == [1000, 10_000, 100_000]


def test_a_study_without_a_gap_is_reported(tmp_path, no_drawing):
    """As one that was shrunk so much that its teacher has learned nothing."""
    write_report(tmp_path, [*baselines(3.0, 3.0), final("cpt", 1, [2.0])], "python")
    assert "| PI, CPT | 15.00M | 0.1 | - |" in (tmp_path / "restoration-tables.md").read_text()


def test_results_that_are_not_complete_are_refused(results, tmp_path):
    for some in ([], results[:2], results[2:], results[1:]):
        assert "run the command final first" in user_error(write_report, tmp_path, some, "python")
    sentence = user_error(write_report, tmp_path, results, "poetry")
    assert "--domain is poetry, and the results are of c, prose, python" in sentence
    assert list(tmp_path.iterdir()) == []


def test_the_published_numbers_are_made_from_the_recorded_results(tmp_path, capsys, no_drawing):
    """The tables of docs/restoration.md, from every measurement of the study."""
    assert restoration("report", FIGURES, "--output", tmp_path) == 0
    recorded = json.loads((FIGURES / "restoration.json").read_text())
    made = json.loads((tmp_path / "restoration.json").read_text())
    assert made.keys() == recorded.keys()
    for run, entry in recorded.items():
        for place in ("in_domain", "out_of_domain"):
            for name, value in entry[place].items():
                new = made[run][place][name]
                if name == "curve":
                    assert [p[0] for p in new] == [p[0] for p in value]
                    assert [p[1] for p in new] == pytest.approx([p[1] for p in value])
                else:
                    assert new == pytest.approx(value), (run, place, name)


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert restoration("report", tmp_path) == 1
    assert "run the command final first" in one_error(capsys.readouterr().err)
