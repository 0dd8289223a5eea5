"""Folders that are written beside their final name and get it once they are whole.

What a killed write left is known by the mark in it, and removed by the next; a folder of that name
without the mark is somebody's, and is left alone.
"""

from __future__ import annotations

import errno
import secrets
import shutil
from pathlib import Path

from megalard.checkpoint.tensor_file import sync_directory
from megalard.errors import UserError

PARTIAL = ".partial"
_MARK = ".unfinished"


def partial_path(directory: Path) -> Path:
    return directory.with_name(directory.name + PARTIAL)


def begin(directory: Path) -> Path:
    """A new, marked folder beside ``directory`` to write into.

    Raises:
        OSError: it cannot be made, or something else has its name.
    """
    partial = partial_path(directory)
    partial.parent.mkdir(parents=True, exist_ok=True)
    abandon(partial)
    if partial.is_dir() and any(partial.iterdir()):
        raise FileExistsError(errno.EEXIST, "it is in the way, move it elsewhere", str(partial))
    partial.mkdir(exist_ok=True)
    (partial / _MARK).touch()
    return partial


def commit(partial: Path, directory: Path) -> None:
    """Give a folder that is on the disk its name; what had it goes only then.

    Raises:
        OSError: as ``directory`` is, it cannot be replaced.
    """
    (partial / _MARK).unlink()
    sync_directory(partial)
    old = None
    if directory.is_dir() and any(directory.iterdir()):
        old = directory.with_name(f"{directory.name}.old-{secrets.token_hex(4)}")
        directory.rename(old)
    partial.rename(directory)
    sync_directory(directory.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def cannot_write(directory: Path, error: OSError) -> UserError:
    """One sentence; a full disk's error may name the file that was being copied to it."""
    named = error.filename if error.errno != errno.ENOSPC else None
    where = f" ({named})" if named else ""
    return UserError(f"cannot write {directory}: {error.strerror or error}{where}")


def abandon(partial: Path) -> None:
    """Remove a folder of an unfinished write."""
    if (partial / _MARK).exists():
        shutil.rmtree(partial, ignore_errors=True)
