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
def temporary_folder(target: Path) -> Iterator[Path]:
    """Make ``.NAME.partial-XXXXXXXX`` next to ``target``, and remove it at the end if it is there.

    Raises:
        OSError: the directory cannot be made.
    """
    folder, descriptor = _make(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_abandoned(target: Path) -> None:
    """Remove the temporary folders of ``target`` whose writers have ended."""
    pattern = f".{target.name}.partial-" + "[0-9a-f]" * (2 * _DIGITS)
    with contextlib.suppress(OSError):
        for folder in [path for path in target.parent.iterdir() if path.match(pattern)]:
            with contextlib.suppress(OSError):
                _remove_if_abandoned(folder)


def _make(target: Path) -> tuple[Path, int]:
    while True:
        folder = target.with_name(f".{target.name}.partial-{secrets.token_hex(_DIGITS)}")
        folder.mkdir(parents=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # some network file systems keep no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return folder, descriptor
        os.close(descriptor)  # another process took it for abandoned before it was locked


def _remove_if_abandoned(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
