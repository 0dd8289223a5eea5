"""Folders that get their names when they are whole: killed at every point, and two at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megalard.errors import UserError
from megalard.files import atomic_folder as partial
from megalard.files import locks
from megalard.files.atomic_folder import PartialFolder


class Killed(BaseException):
    """After it nothing of the process runs any more."""


def write(folder: PartialFolder, text: str) -> None:
    folder.begin()
    (folder.path / "content").write_text(text)
    folder.commit()


def killed_at(call: int, monkeypatch) -> list[str]:
    """Has the process die before the given one of the calls that change names; returns them."""
    made = []

    def dying(name, function):
        def run(*args, **kwargs):
            if len(made) == call:
                raise Killed
            made.append(name)
            return function(*args, **kwargs)

        return run

    for owner, names in (
        (Path, ("rename", "unlink", "mkdir", "touch")),
        (shutil, ("rmtree",)),
        (partial, ("sync_directory", "hold")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, dying(name, getattr(owner, name)))
    return made


@pytest.mark.parametrize("replace", [False, True])
def test_killed_at_any_point_the_next_write_works(replace, tmp_path, monkeypatch):
    finished = False
    for call in range(30):
        target = tmp_path / str(call) / "out"
        target.parent.mkdir()
        if replace:
            write(PartialFolder(target, replace), "old")
        with monkeypatch.context() as patches:
            made = killed_at(call, patches)
            try:
                write(PartialFolder(target, replace), "new")
                finished = True
            except Killed:
                pass
        if finished:
            break
        # between two names, what there was before is not lost and comes back
        follower = PartialFolder(target, replace)
        if not replace and target.exists():
            assert (target / "content").read_text() == "new"
            continue
        follower.begin()
        if replace:
            assert (target / "content").read_text() in ("old", "new")
        (follower.path / "content").write_text("next")
        follower.commit()
        assert (target / "content").read_text() == "next"
        assert [path.name for path in target.parent.iterdir()] == ["out"]
        assert [path.name for path in target.iterdir()] == ["content"]
    assert finished and len(made) > (6 if replace else 4)
    assert made[-1] == ("rmtree" if replace else "unlink")


def test_a_living_writer_is_not_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.2)
    first, second = (PartialFolder(tmp_path / "out") for _ in range(2))
    first.begin()
    (first.path / "content").write_text("first")
    with pytest.raises(UserError, match=r"another process is writing .*out"):
        second.begin()
    second.abandon()
    first.commit()
    assert (tmp_path / "out" / "content").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_got_the_name_meanwhile_stays(tmp_path):
    folder = PartialFolder(tmp_path / "out")
    folder.begin()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OSError, match="not empty"):
        folder.commit()
    folder.abandon()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_what_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    write(PartialFolder(tmp_path / "out"), "old")
    folder = PartialFolder(tmp_path / "out", replace=True)
    folder.begin()
    rename = Path.rename

    def refusing(self, target):
        if self == folder.path:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="Input/output"):
        folder.commit()
    folder.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "content").read_text() == "old"


def test_the_name_is_on_the_disk_before_the_old_folder_goes(tmp_path, monkeypatch):
    write(PartialFolder(tmp_path / "out"), "old")
    calls = killed_at(100, monkeypatch)
    write(PartialFolder(tmp_path / "out", replace=True), "new")
    assert calls.index("sync_directory") < calls.index("rmtree")
    assert calls.index("sync_directory") > len(calls) - 1 - calls[::-1].index("rename")


def test_somebodys_folders_are_left_alone(tmp_path):
    names = ["out.old", "out.old-12345678", "out.old-notahash", "other.old-abcdef01"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    write(PartialFolder(tmp_path / "out"), "new")
    write(PartialFolder(tmp_path / "out", replace=True), "newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", *names])
    assert len(list(tmp_path.glob("*/precious"))) == 4
