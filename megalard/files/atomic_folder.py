"""Folders that are written beside their final name and get it once they are whole.

What a killed write left is known by the mark in it, which a living writer has locked, and is
removed by the next; a folder of that name without the mark is somebody's, and is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
from pathlib import Path
from typing import IO

from megalard.errors import UserError
from megalard.files.locks import hold
from megalard.files.safetensors import sync_directory

_MARK = ".unfinished"


class PartialFolder:
    """``NAME.partial`` beside ``NAME``; one process begins, commits and abandons it.

    Attributes:
        directory: the final name.
        path: where to write; other ranks may write there as well, between ``begin`` and ``commit``.

    Args:
        replace: whether a folder that has the final name gives way.
    """

    def __init__(self, directory: Path, replace: bool = False):
        self.directory, self.replace = directory, replace
        self.path = directory.with_name(directory.name + ".partial")
        self._mark: IO[bytes] | None = None

    def begin(self) -> None:
        """Make the folder, in place of what a killed write left.

        Raises:
            OSError: it cannot be made, or something else has its name.
            UserError: another process is writing it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.replace:
            self._put_back()
        _remove_marked(self.path)
        if self.path.is_dir() and any(self.path.iterdir()):
            raise FileExistsError(
                errno.EEXIST, "it is in the way, move it elsewhere", str(self.path)
            )
        self.path.mkdir(exist_ok=True)
        self._mark = hold(self.path / _MARK, str(self.directory))

    def commit(self) -> None:
        """Give the folder, which is on the disk, its name; what had it goes only then.

        Raises:
            OSError: something that must not be replaced has the name; it and the folder stay.
        """
        directory, old = self.directory, None
        if self.replace and directory.is_dir() and any(directory.iterdir()):
            old = directory.with_name(f"{directory.name}.old-{secrets.token_hex(4)}")
            (directory / _MARK).touch()
            directory.rename(old)
        try:
            self.path.rename(directory)
        except OSError:
            if old is not None:
                old.rename(directory)
                (directory / _MARK).unlink()
            raise
        sync_directory(directory.parent)
        # where a kill leaves it in a folder that has its name, it does no harm
        with contextlib.suppress(OSError):
            (directory / _MARK).unlink()
        self._mark.close()
        self._mark = None
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def abandon(self) -> None:
        """Remove the folder, if it was begun and has not got its name."""
        if self._mark is not None:
            _remove(self.path, self._mark)
            self._mark = None

    def _put_back(self) -> None:
        """Undo what a kill between the two renames of ``commit`` left."""
        pattern = ".old-" + "[0-9a-f]" * 8
        for old in self.directory.parent.glob("*" + pattern):
            if old.name.rpartition(".old-")[0] != self.directory.name:
                continue
            if not self.directory.exists():
                old.rename(self.directory)
            else:
                _remove_marked(old)


def _remove_marked(folder: Path) -> None:
    mark = folder / _MARK
    if mark.exists():
        _remove(folder, hold(mark, str(folder)))


def _remove(folder: Path, mark: IO[bytes]) -> None:
    """Remove a folder; its mark last, and closed, as NFS keeps an open file and so the folder."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _MARK:
                path.unlink()
    mark.close()
    shutil.rmtree(folder, ignore_errors=True)


def cannot_write(directory: Path, error: OSError) -> UserError:
    """One sentence; a full disk's error may name the file that was being copied to it."""
    named = error.filename if error.errno != errno.ENOSPC else None
    where = f" ({named})" if named else ""
    return UserError(f"cannot write {directory}: {error.strerror or error}{where}")
