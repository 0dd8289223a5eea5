"""Temporary folders: removed by their writer or, if that was killed, by the next one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megalard.files.temporary_folders import remove_abandoned, temporary_folder
from tests.ranks import exit_codes, started_ranks, wait_until


def _write_and_wait(target: str) -> None:
    with temporary_folder(Path(target)) as folder:
        (folder / "content").write_text("half")
        signal.pause()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_is_next_to_its_target_and_goes_with_the_block(tmp_path):
    with temporary_folder(tmp_path / "deep" / "out") as folder:
        assert folder.parent == tmp_path / "deep" and folder.name.startswith(".out.partial-")
        (folder / "content").write_text("x")
    assert names(tmp_path / "deep") == []
    with pytest.raises(KeyError), temporary_folder(tmp_path / "out"):
        raise KeyError
    with temporary_folder(tmp_path / "out") as folder:
        folder.rename(tmp_path / "out")
    assert names(tmp_path) == ["deep", "out"]


def test_the_folder_of_a_killed_writer_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    with started_ranks(1, _write_and_wait, str(tmp_path / "out")) as (writer,):
        wait_until(lambda: list(tmp_path.glob(".out.partial-*/content")))
        before = names(tmp_path)
        remove_abandoned(tmp_path / "out")
        assert names(tmp_path) == before and len(before) == 1
        os.kill(writer.pid, signal.SIGKILL)
        exit_codes([writer])
    remove_abandoned(tmp_path / "out")
    assert names(tmp_path) == []


def test_what_others_made_is_left_alone(tmp_path):
    for name in (".out.partial-123", ".out.partial-notahexa", ".other.partial-01234567"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.partial-00000000").write_text("a file")
    before = names(tmp_path)
    remove_abandoned(tmp_path / "out")
    remove_abandoned(tmp_path / "missing" / "out")
    assert names(tmp_path) == before
