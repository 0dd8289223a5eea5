"""TensorBoard reads what was written; errors of the disk reach the caller."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalard.training.board import Board
from tests.mounts import mounted


def test_tensorboard_shows_the_scalars_and_a_later_start_takes_their_place(tmp_path):
    folder = tmp_path / "tensorboard"
    board = Board(folder, 1)
    for step in (1, 2, 3):
        board.add({"loss": 2.0 * step, "rate": 0.5}, step)
    board.close()
    # Steps 3 and later are taken again.
    board = Board(folder, 3)
    board.add({"loss": 100.0, "rate": 0.5}, 3)
    board.close()
    shown = EventAccumulator(str(folder))
    shown.Reload()
    assert shown.Tags()["scalars"] == ["loss", "rate"]
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(1, 2.0), (2, 4.0), (3, 100.0)]


def test_a_file_in_place_of_the_directory_is_an_error(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(FileExistsError):
        Board(tmp_path / "tensorboard", 1)


def test_a_full_disk_is_an_error_at_once(tmp_path):
    with mounted(tmp_path / "small", "size=8k") as disk:
        board = Board(disk / "tensorboard", 1)
        with pytest.raises(OSError, match="No space left"):
            for step in range(2000):
                board.add({"loss": 1.0}, step)
