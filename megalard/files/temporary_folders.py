"""Directories with random names, next to what they will become, that a killed writer may leave.

The writer of such a directory holds a lock on it. If the lock can be taken, the writer has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DIGITS = 4  # bytes, which are twice as many hexadecimal digits


@contextmanager
def temporary_folder(target: Path, note: str | None = None) -> Iterator[Path]:
    """Make ``.NAME.partial-XXXXXXXX`` next to ``target``, and remove it at the end if it is there.

    Args:
        note: the name of a file in which a writer notes how far it got. A folder that has the note
            is kept if an exception ends the block. If a writer that has ended left such a folder,
            that folder is yielded instead of a new one.

    Raises:
        OSError: the directory cannot be made.
    """
    folder, descriptor = (_adopt(target, note) if note else None) or _make(target)
    is_kept = False
    try:
        yield folder
    except BaseException:
        is_kept = note is not None and (folder / note).is_file()
        raise
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_abandoned(target: Path, note: str | None = None) -> None:
    """Remove the temporary folders of ``target`` whose writers have ended.

    Args:
        note: a folder that has this file is kept.
    """
    for folder in _folders_of(target):
        if note is not None and (folder / note).is_file():
            continue
        remove_if_abandoned(folder)


def remove_if_abandoned(folder: Path) -> None:
    """Remove a directory unless a process has locked it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def lock_folder(folder: Path) -> int:
    """Lock a directory for this process; return its descriptor, which releases the lock if closed.

    Some network file systems keep no locks. There the descriptor is returned without one.

    Raises:
        OSError: the directory cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _folders_of(target: Path) -> list[Path]:
    pattern = f".{target.name}.partial-" + "[0-9a-f]" * (2 * _DIGITS)
    try:
        return sorted(path for path in target.parent.iterdir() if path.match(pattern))
    except OSError:
        return []


def _adopt(target: Path, note: str) -> tuple[Path, int] | None:
    """Return a folder with a note whose writer has ended, locked; None if there is none."""
    for folder in _folders_of(target):
        if not (folder / note).is_file():
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                continue
            if os.fstat(descriptor).st_nlink:
                return folder, descriptor
            os.close(descriptor)
    return None


def _make(target: Path) -> tuple[Path, int]:
    while True:
        folder = target.with_name(f".{target.name}.partial-{secrets.token_hex(_DIGITS)}")
        folder.mkdir(parents=True)
        descriptor = lock_folder(folder)
        if os.fstat(descriptor).st_nlink:
            return folder, descriptor
        os.close(descriptor)  # another process took it for abandoned before it was locked
