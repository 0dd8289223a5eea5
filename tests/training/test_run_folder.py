"""The directory of a run's checkpoints: complete ones, unfinished ones, and removals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megalard.training.run_folder import checkpoint_path, checkpoints, discard, unfinished


@pytest.fixture
def folder(tmp_path):
    """A directory with checkpoints, unfinished saves and other things."""
    for name in (
        "step-000010",
        "step-000002",
        "step-1000000",
        "step-000011.partial",
        "step-000001.removed",
        "step-000009.done-01234567",
        "step-000009.done-of-mine",
        "mine.partial",
        "step-x",
        "steps-000003",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000012.partial").touch()
    return tmp_path


def test_checkpoints_are_in_the_order_of_their_steps(folder):
    assert [(step, path.name) for step, path in checkpoints(folder)] == [
        (2, "step-000002"),
        (10, "step-000010"),
        (1_000_000, "step-1000000"),
    ]
    assert checkpoints(folder / "none") == []
    assert checkpoint_path(folder, 10) == folder / "step-000010"


def test_unfinished_saves_and_removals_are_directories_of_a_run(folder):
    assert [path.name for path in unfinished(folder)] == [
        "step-000001.removed",
        "step-000009.done-01234567",
        "step-000011.partial",
    ]
    assert unfinished(folder / "none") == []


def test_a_removal_that_is_killed_leaves_nothing_that_looks_complete(folder, monkeypatch):
    (folder / "step-000010" / "manifest.json").touch()

    def killed(*arguments, **options):
        raise SystemExit

    with monkeypatch.context() as patches:
        patches.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            discard(folder / "step-000010")
    assert [step for step, _ in checkpoints(folder)] == [2, 1_000_000]
    assert Path(folder / "step-000010.removed") in unfinished(folder)
    discard(folder / "step-000002")
    assert not (folder / "step-000002").exists()
