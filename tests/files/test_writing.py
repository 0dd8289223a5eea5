"""Written files are on the disk, and errors of writing name the directory."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from megalard.files.writing import cannot_write, file_sha256, no_progress, replace_text, sync_files


@pytest.fixture
def synced(monkeypatch) -> list[Path]:
    """The files and directories that have been written to the disk so far."""
    paths, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return paths


def test_every_file_and_then_the_directory_is_synced(tmp_path, synced):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    sync_files(tmp_path)
    assert sorted(synced[:2]) == [tmp_path / "a", tmp_path / "b"] and synced[2:] == [tmp_path]


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20 + 3])
def test_the_checksum_is_that_of_hashlib(size, tmp_path):
    content = os.urandom(size)
    (tmp_path / "x").write_bytes(content)
    counts: list[int] = []
    assert file_sha256(tmp_path / "x", counts.append) == hashlib.sha256(content).hexdigest()
    assert sum(counts) == size
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
    assert no_progress(3) is None


def test_a_small_file_has_its_old_content_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path, seen, replace = tmp_path / "a.json", [], Path.replace
    path.write_text("old")
    monkeypatch.setattr(
        Path, "replace", lambda *paths: seen.append(path.read_text()) or replace(*paths)
    )
    replace_text(path, "new")
    assert seen == ["old"] and path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_directory_and_the_file():
    denied = PermissionError(errno.EACCES, "Permission denied", "/out/file")
    assert str(cannot_write(Path("/out"), denied)) == (
        "cannot write /out: Permission denied (/out/file)"
    )


def test_a_full_disk_does_not_blame_the_file_that_was_copied():
    full = OSError(errno.ENOSPC, "No space left on device", "/source/tokenizer.json")
    assert str(cannot_write(Path("/out"), full)) == "cannot write /out: No space left on device"
