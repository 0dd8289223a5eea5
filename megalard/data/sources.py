"""Read documents from files and directories of them, in a fixed order."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megalard.data.document_source import DocumentSource
from megalard.data.formats import SUFFIXES, Column, read_file, suffix_of, text_column
from megalard.errors import UserError
from megalard.files.hints import fix_for_text
from megalard.files.reading import cannot_read, check_if_regular

# The suffixes that errors name; the rest of SUFFIXES are compressed files of these.
_NAMED = [suffix for suffix in SUFFIXES if suffix.count(".") == 1]
_TEXT = text_column("text")


@dataclass(frozen=True)
class PassedOver:
    """The files of directories that are not read, because their suffix is not that of a text file.

    Attributes:
        files, bytes: how many, and their size together.
        suffixes: their suffixes, the one with most bytes first.
        example: one of them.
    """

    files: int
    bytes: int
    suffixes: tuple[str, ...]
    example: Path

    def describe(self) -> str:
        """Return the part of a sentence that names the files."""
        suffixes = ", ".join(suffix or "no suffix" for suffix in self.suffixes[:4])
        return f"{self.files} files of {self.bytes:,} bytes ({suffixes}), such as {self.example}"


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files of ``paths`` in the given order; files of a directory are sorted by path.

    Directories are read recursively, through links too. Hidden files and directories and files with
    other suffixes are passed over.

    Raises:
        UserError: a path is missing, unreadable or has another suffix, a directory contains no text
            file or more bytes that are passed over than text, or no path was given.
    """
    return survey(paths)[0]


def survey(paths: Iterable[str | Path]) -> tuple[list[Path], PassedOver | None]:
    """Return the files of ``paths`` as ``list_files``, and what is passed over in directories.

    Raises:
        UserError: as ``list_files``.
    """
    files: list[Path] = []
    others: list[Path] = []
    for path in map(Path, paths):
        try:
            is_folder, is_there = path.is_dir(), path.exists()
        except OSError as error:  # such as a name that is too long
            raise cannot_read(path, error) from None
        if is_folder:
            texts, not_read = _files_in(path)
            files += texts
            others += not_read
        elif not is_there:
            raise UserError(f"data path {path} does not exist: {fix_for_text(path)}")
        elif suffix_of(path) not in SUFFIXES:
            raise UserError(
                f"data file {path} has the unsupported suffix {suffix_of(path)!r}: "
                f"give one of {', '.join(_NAMED)} or a directory of them{_hint(path)}"
            )
        else:
            files.append(path)
    if not files:
        raise UserError("no data path was given: name at least one text file or directory")
    for file in files:
        check_if_regular(file)
        if not os.access(file, os.R_OK):
            raise UserError(f"data file {file} is not readable: change its permissions")
    return files, _passed_over(others)


def _hint(path: Path) -> str:
    fix = fix_for_text(path)
    return "" if fix == "check its spelling" else f"; {fix}"


def _files_in(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the text files of a directory and the files that are passed over, sorted by path."""

    def refuse(error: OSError) -> None:
        raise UserError(f"data directory {error.filename} cannot be read: {error.strerror}")

    files: list[Path] = []
    others: list[Path] = []
    entered = set()
    for parent, directories, names in os.walk(directory, onerror=refuse, followlinks=True):
        # A link to a directory that was entered before, such as to a parent, has no end.
        identity = (os.stat(parent).st_dev, os.stat(parent).st_ino)
        if identity in entered:
            directories[:] = []
            continue
        entered.add(identity)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            path = Path(parent, name)
            (files if suffix_of(path) in SUFFIXES else others).append(path)
    passed_over = _passed_over(sorted(others))
    if not files:
        content = f", only {passed_over.describe()}" if passed_over else ""
        raise UserError(
            f"data directory {directory} contains no {', '.join(_NAMED)} file{content}: add "
            "some text, or convert it"
        )
    size = sum(_size(file) for file in files)
    if passed_over and passed_over.bytes > size:
        raise UserError(
            f"most of the data directory {directory} would be passed over: {passed_over.describe()}"
            f", where {len(files)} files of {size:,} bytes are text. Convert them to .jsonl, or "
            "give the text files by name"
        )
    return sorted(files), sorted(others)


def _passed_over(files: list[Path]) -> PassedOver | None:
    if not files:
        return None
    sizes: dict[str, int] = {}
    for file in files:
        suffix = suffix_of(file)
        sizes[suffix] = sizes.get(suffix, 0) + _size(file)
    suffixes = tuple(sorted(sizes, key=lambda suffix: -sizes[suffix]))
    return PassedOver(len(files), sum(sizes.values()), suffixes, files[0])


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a link that leads nowhere
        return 0


def read_documents(
    paths: Iterable[str | Path],
    column: Column = _TEXT,
    advance: Callable[[int], object] | None = None,
) -> Iterator[str]:
    """Yield the documents of ``paths``: one per text file, one per line or row of other files.

    Documents that consist of white space are skipped.

    Args:
        paths: files and directories, as for ``list_files``.
        column: where a line or a row has its document.
        advance: called with the number of bytes that were just read, for a progress bar.

    Raises:
        UserError: as ``list_files`` and ``formats.read_file``; there is no document at all.
    """
    files = list_files(paths)
    is_empty = True
    for file in files:
        try:
            for text, size in read_file(file, column):
                if text.strip():
                    is_empty = False
                    yield text
                if advance is not None:
                    advance(size)
        except OSError as error:
            raise UserError(f"data file {file} cannot be read: {error.strerror}") from error
    if is_empty:
        names = ", ".join(map(str, files[:3])) + (", …" if len(files) > 3 else "")
        raise UserError(f"there is no text in {names}: give files that contain text")


class Text(DocumentSource):
    """The documents of some paths.

    Args:
        paths: files and directories, as for ``list_files``.
        column: where a line or a row has its document.

    Attributes:
        files: a sha256 of the path, size and modification time of every file, and of the column.

    Raises:
        UserError: as ``list_files``.
    """

    def __init__(self, paths: Iterable[str | Path], column: Column = _TEXT):
        self.paths, self.column = list(paths), column
        identity = column.key if column.identity is None else [column.key, column.identity]
        digest = hashlib.sha256(json.dumps(identity).encode())
        for file in list_files(self.paths):
            stat = file.stat()
            entry = [os.fspath(file.resolve()), stat.st_size, stat.st_mtime_ns]
            digest.update(json.dumps(entry).encode())
        self.files = digest.hexdigest()

    def read(self, advance: Callable[[int], object] | None) -> Iterator[str]:
        """Yield the documents, as ``read_documents``."""
        return read_documents(self.paths, self.column, advance)


def total_bytes(paths: Iterable[str | Path]) -> int:
    """Return the number of bytes that ``read_documents`` will read."""
    return sum(file.stat().st_size for file in list_files(paths))
