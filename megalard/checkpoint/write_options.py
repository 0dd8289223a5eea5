"""What the writers of models have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megalard.checkpoint.companions import Companion
from megalard.files.writing import Progress, no_progress

FILE_BYTES = 4 * 2**30


def _nothing() -> None:
    pass


def _accept(directory: Path) -> None:
    pass


@dataclass(frozen=True)
class WriteOptions:
    """How a model is written.

    Attributes:
        companions: files that are written next to the weights, such as the tokenizer's.
        file_bytes: a file ends before it would exceed this size, unless a single tensor does.
        progress: called with the number of bytes of each part that this rank has written.
        before_commit: called on every rank when all files are written and the directory does not
            have its name yet. An error that it raises leaves nothing behind.
        check: called on rank 0 with the complete directory before it has its name. An error that
            it raises leaves nothing behind.
    """

    companions: tuple[Companion, ...] = ()
    file_bytes: int = FILE_BYTES
    progress: Progress = no_progress
    before_commit: Callable[[], None] = _nothing
    check: Callable[[Path], None] = _accept


def split_by_size(sizes: dict[str, int], file_bytes: int) -> list[list[str]]:
    """Split names, in their order, into files of at most ``file_bytes`` or of one tensor.

    Args:
        sizes: the number of bytes of each tensor.
    """
    files: list[list[str]] = []
    current_bytes = 0
    for name, size in sizes.items():
        if not files or current_bytes + size > file_bytes:
            files.append([])
            current_bytes = 0
        files[-1].append(name)
        current_bytes += size
    return files
