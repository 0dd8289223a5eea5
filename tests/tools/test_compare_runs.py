"""Several restorations next to each other: which models are shown, and what is refused."""

from __future__ import annotations

from pathlib import Path

from megalard.evaluation.measure import Measurement
from megalard.evaluation.report import Entry, Restoration, write_json
from megalard.evaluation.suite import Results
from tests.command_line import user_error
from tools.compare_runs import collect


def make_run(folder: Path, restored: float, teacher: float = 1.0, factor: float = 4.0) -> Path:
    """Write the evaluation of a run of two stages; return its directory."""
    folder.mkdir()
    losses = {"teacher": teacher, "scaled": 3.0, "after first": 2.5, "restored": restored}
    entries = [
        Entry(name, Results({64: Measurement(loss)}), tokens=7) for name, loss in losses.items()
    ]
    write_json(folder / "evaluation.json", entries, {}, Restoration(64, factor))
    return folder


def test_each_run_s_restored_student_is_shown_after_the_first_run_s_teacher(tmp_path):
    runs = [make_run(tmp_path / name, loss) for name, loss in (("one", 2.0), ("two", 1.5))]
    entries, restoration = collect(runs)
    assert [(entry.name, entry.short_loss(64)) for entry in entries] == [
        ("teacher", 1.0),
        ("scaled", 3.0),
        ("one", 2.0),
        ("two", 1.5),
    ]
    assert [restoration.gap_restored(entry, entries) for entry in entries[2:]] == [0.5, 0.75]


def test_runs_of_another_teacher_or_factor_are_refused(tmp_path):
    first = make_run(tmp_path / "first", 2.0)
    for other in (
        make_run(tmp_path / "teacher", 2.0, teacher=1.01),
        make_run(tmp_path / "factor", 2.0, factor=8.0),
    ):
        assert user_error(collect, [first, other]) == (
            f"{other} restored another model than {first}, or was evaluated on other text: "
            "compare runs with the same teacher, RoPE and held-out text"
        )
    (tmp_path / "empty").mkdir()
    assert "has no evaluation.json" in user_error(collect, [first, tmp_path / "empty"])
