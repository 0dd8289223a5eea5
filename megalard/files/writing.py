"""Make written files durable, and report errors of writing."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from megalard.errors import DiskError, UserError
from megalard.files.reading import check_regular

Progress = Callable[[int], object]
"""Called with the number of bytes that were just read or written."""


def no_progress(count: int) -> None:
    """Ignore progress."""


def cannot_write(directory: Path, error: OSError) -> UserError:
    """Return the error about a directory that cannot be written.

    The error of a full disk may name the file that was being copied to it, which is not at fault.
    """
    file = error.filename if error.errno != errno.ENOSPC else None
    where = f" ({file})" if file else ""
    return DiskError(f"cannot write {directory}: {error.strerror or error}{where}")


def replace_text(path: Path, text: str) -> None:
    """Write a small file that has its old or its new content, even if the process is killed.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(partial, "x", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def sync_files(directory: Path) -> None:
    """Wait until all files below a directory, and their names, are on the disk."""
    for path in directory.iterdir():
        if path.is_dir():
            sync_files(path)
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(path: str | Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path, progress: Progress = no_progress) -> str:
    """Return the sha256 of a file in hexadecimal, in constant memory.

    Raises:
        UserError: the path is not a regular file.
        OSError: the file cannot be read.
    """
    check_regular(path)
    digest = hashlib.sha256()
    buffer = bytearray(4 * 2**20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
            progress(count)
    return digest.hexdigest()
