"""Directories that appear only when complete: killed at every point, and two writers at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megalard.errors import UserError
from megalard.files import atomic_folder, locks
from megalard.files.atomic_folder import AtomicFolder


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process runs after it."""


def write(folder: AtomicFolder, text: str) -> None:
    """Write a complete directory with one file."""
    folder.begin()
    (folder.path / "content").write_text(text)
    folder.commit()


def killed_at(call: int, monkeypatch) -> list[str]:
    """Kill the process before a given call among those that change names; return the calls."""
    calls = []

    def dying(name, function):
        def run(*args, **kwargs):
            if len(calls) == call:
                raise Killed
            calls.append(name)
            return function(*args, **kwargs)

        return run

    for owner, names in (
        (Path, ("rename", "unlink", "mkdir", "touch")),
        (shutil, ("rmtree",)),
        (atomic_folder, ("sync_directory", "hold_lock")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, dying(name, getattr(owner, name)))
    return calls


@pytest.mark.parametrize("replace", [False, True])
def test_after_a_kill_at_any_point_the_next_write_succeeds(replace, tmp_path, monkeypatch):
    finished = False
    for call in range(30):
        target = tmp_path / str(call) / "out"
        target.parent.mkdir()
        if replace:
            write(AtomicFolder(target, replace), "old")
        with monkeypatch.context() as patches:
            calls = killed_at(call, patches)
            try:
                write(AtomicFolder(target, replace), "new")
                finished = True
            except Killed:
                pass
        if finished:
            break
        # Between the two renames the earlier directory has another name, which is undone.
        follower = AtomicFolder(target, replace)
        # A directory with the final name is complete, and has nothing else in it.
        if target.exists():
            assert [path.name for path in target.iterdir()] == ["content"]
        if not replace and target.exists():
            assert (target / "content").read_text() == "new"
            assert [path.name for path in target.parent.iterdir()] == ["out"]
            continue
        follower.begin()
        if replace:
            assert (target / "content").read_text() in ("old", "new")
        (follower.path / "content").write_text("next")
        follower.commit()
        assert (target / "content").read_text() == "next"
        assert [path.name for path in target.parent.iterdir()] == ["out"]
        assert [path.name for path in target.iterdir()] == ["content"]
    assert finished and len(calls) > (6 if replace else 4)
    assert calls[-1] == ("rmtree" if replace else "sync_directory")


def test_a_living_writer_is_not_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.2)
    first, second = (AtomicFolder(tmp_path / "out") for _ in range(2))
    first.begin()
    (first.path / "content").write_text("first")
    with pytest.raises(UserError, match=r"another process is writing .*out"):
        second.begin()
    second.abandon()
    first.commit()
    assert (tmp_path / "out" / "content").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_appears_meanwhile_is_left_alone(tmp_path):
    folder = AtomicFolder(tmp_path / "out")
    folder.begin()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OSError, match="not empty"):
        folder.commit()
    folder.abandon()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_an_earlier_directory_is_put_back_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    write(AtomicFolder(tmp_path / "out"), "old")
    folder = AtomicFolder(tmp_path / "out", replace=True)
    folder.begin()
    rename = Path.rename

    def refusing(self, target):
        if target == folder.directory and ".done-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="Input/output"):
        folder.commit()
    folder.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "content").read_text() == "old"


def test_the_new_name_is_on_the_disk_before_the_old_directory_is_removed(tmp_path, monkeypatch):
    write(AtomicFolder(tmp_path / "out"), "old")
    calls = killed_at(100, monkeypatch)
    write(AtomicFolder(tmp_path / "out", replace=True), "new")
    last = {name: len(calls) - 1 - calls[::-1].index(name) for name in calls}
    assert last["rename"] < last["sync_directory"] < last["rmtree"]
    removals = [number for number, name in enumerate(calls) if name == "rmtree"]
    assert min(removals) > last["sync_directory"]


def test_what_a_kill_left_of_a_replaced_directory_is_removed(tmp_path):
    """The mark is the last file that is removed, and an empty directory needs none."""
    write(AtomicFolder(tmp_path / "out"), "new")
    for name, files in (("out.old-00000001", [".unfinished", "content"]), ("out.old-00000002", [])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    write(AtomicFolder(tmp_path / "out", replace=True), "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_writer_that_is_about_to_rename_is_not_disturbed(tmp_path, monkeypatch):
    folder, calls = AtomicFolder(tmp_path / "out"), []
    folder.begin()
    (folder.path / "content").touch()
    rename = Path.rename

    def interrupted(self, target):
        if target == folder.directory:  # its mark is gone and its final name is not there
            calls.append([path.name for path in self.iterdir()])
            AtomicFolder(tmp_path / "out").recover()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    folder.commit()
    assert calls == [["content"]]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["content"]


def test_a_name_that_is_too_long_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match="too long"):
        AtomicFolder(tmp_path / ("x" * 245)).begin()
    assert list(tmp_path.iterdir()) == []


def test_directories_of_somebody_else_are_left_alone(tmp_path):
    names = ["out.old", "out.old-12345678", "out.old-notahash", "other.old-abcdef01"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    write(AtomicFolder(tmp_path / "out"), "new")
    write(AtomicFolder(tmp_path / "out", replace=True), "newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", *names])
    assert len(list(tmp_path.glob("*/precious"))) == 4


def test_a_partial_directory_without_a_mark_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("x")
    folder = AtomicFolder(tmp_path / "out")
    with pytest.raises(FileExistsError, match="it is in the way, move it elsewhere"):
        folder.begin()
    folder.abandon()
    assert (tmp_path / "out.partial" / "precious").read_text() == "x"


def test_an_abandoned_directory_leaves_nothing(tmp_path):
    folder = AtomicFolder(tmp_path / "deep" / "out")
    folder.begin()
    (folder.path / "content").write_text("x")
    (folder.path / "inner").mkdir()
    folder.abandon()
    folder.abandon()
    assert list((tmp_path / "deep").iterdir()) == []
