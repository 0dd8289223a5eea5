"""Directories that appear under their name only when they are complete.

A directory ``NAME`` is written as ``NAME.partial``. While it is written it holds a mark, a file
that its writer has locked. A killed writer leaves the mark unlocked, and the next writer then
removes the directory. A directory ``NAME.partial`` without a mark was made by somebody else and is
left alone.

When everything is written, the directory becomes ``NAME.done-XXXXXXXX``, loses its mark, and
becomes ``NAME``. A directory ``NAME`` therefore never has a mark, whenever its writer was killed.
The writer has locked the directory itself meanwhile, and the next writer removes a directory
``NAME.done-XXXXXXXX`` that is not locked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from megalard.files.locks import hold_lock
from megalard.files.temporary_folders import lock_folder, remove_if_abandoned
from megalard.files.writing import sync_directory

MARK = ".unfinished"
_DIGITS = "[0-9a-f]" * 8


class AtomicFolder:
    """A directory that is being written. One process begins it, and then commits or abandons it.

    Attributes:
        directory: the final name.
        path: where to write. Other ranks may write there as well, between ``begin`` and ``commit``.

    Args:
        replace: whether a directory that has the final name is replaced.
        is_ours: whether an entry of a replaced directory was written by us. Other entries are kept.
    """

    def __init__(
        self,
        directory: Path,
        replace: bool = False,
        is_ours: Callable[[str], bool] = lambda name: True,
    ):
        self.directory, self.replace, self.is_ours = directory, replace, is_ours
        self.path = directory.with_name(directory.name + ".partial")
        self._done = directory.with_name(f"{directory.name}.done-{secrets.token_hex(4)}")
        self._mark: IO[bytes] | None = None

    def begin(self) -> None:
        """Make the directory ``path``, in place of a directory that a killed writer left.

        Raises:
            OSError: the directory cannot be made, or something else has its name.
            UserError: another process is writing it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._done.lstat()  # a name that is too long is refused before anything is written
        self.recover()
        if self.path.is_dir() and any(self.path.iterdir()):
            raise FileExistsError(
                errno.EEXIST, "it is in the way, move it elsewhere", str(self.path)
            )
        self.path.mkdir(exist_ok=True)
        self._mark = hold_lock(self.path / MARK, str(self.directory))

    def commit(self) -> None:
        """Rename the finished directory to its final name.

        The caller has written the content of every file to the disk. A directory that is replaced
        is removed only after the rename has succeeded.

        Raises:
            OSError: the final name belongs to something that must not be replaced. That and
                ``path`` stay as they are.
        """
        directory, done, old = self.directory, self._done, None
        sync_directory(self.path)
        is_replacing = self.replace and directory.is_dir() and any(directory.iterdir())
        if is_replacing:
            self._keep_others()
        lock = lock_folder(self.path)
        try:
            self.path.rename(done)
            (done / MARK).unlink()
            try:
                if is_replacing:
                    old = directory.with_name(f"{directory.name}.old-{secrets.token_hex(4)}")
                    directory.rename(old)
                    (old / MARK).touch()
                done.rename(directory)
            except OSError:
                if old is not None and old.exists():
                    _restore(old, directory)
                (done / MARK).touch()
                done.rename(self.path)
                raise
        finally:
            os.close(lock)
        sync_directory(directory.parent)
        self._mark.close()
        self._mark = None
        if old is not None:
            _remove(old, hold_lock(old / MARK, str(old)))

    def _keep_others(self) -> None:
        """Copy the files that are not ours from the old directory to the new one."""
        for entry in self.directory.iterdir():
            target = self.path / entry.name
            if entry.name == MARK or self.is_ours(entry.name) or target.exists():
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, target, symlinks=True, copy_function=_link_or_copy)
            else:
                _link_or_copy(entry, target)

    def abandon(self) -> None:
        """Remove the directory if it was begun and not committed."""
        if self._mark is not None:
            _remove(self.path, self._mark)
            self._mark = None

    def recover(self) -> None:
        """Repair what a killed writer of this directory left behind.

        Raises:
            OSError: something cannot be repaired.
            UserError: another process is writing the directory.
        """
        for done in self._others(".done-"):
            remove_if_abandoned(done)
        for old in self._others(".old-") if self.replace else ():
            if not self.directory.exists():
                _restore(old, self.directory)
            elif any(old.iterdir()):
                _remove_marked(old)
            else:
                old.rmdir()
        _remove_marked(self.path)

    def _others(self, middle: str) -> list[Path]:
        paths = self.directory.parent.glob(f"*{middle}{_DIGITS}")
        name = self.directory.name
        return [path for path in paths if path.name.rpartition(middle)[0] == name]


def _restore(old: Path, directory: Path) -> None:
    """Give a directory that was to be replaced its name back."""
    (old / MARK).unlink(missing_ok=True)
    old.rename(directory)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _remove_marked(folder: Path) -> None:
    """Remove a directory that has a mark which no living writer holds."""
    mark = folder / MARK
    if mark.exists():
        _remove(folder, hold_lock(mark, str(folder)))


def _remove(folder: Path, mark: IO[bytes]) -> None:
    """Remove a directory, its mark last.

    The mark is closed first, because NFS keeps an open file, and with it the directory.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARK:
                path.unlink()
    mark.close()
    shutil.rmtree(folder, ignore_errors=True)
