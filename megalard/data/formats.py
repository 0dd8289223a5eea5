"""Read the documents of one file: plain text, JSON Lines, Parquet or Arrow, compressed or not."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megalard.errors import UserError, reason_of

TEXT_SUFFIXES = (".txt", ".md", ".py")
_COMPRESSIONS = (".gz", ".zst")
# Rows of a table that are in memory at a time.
_ROWS = 256


@dataclass(frozen=True)
class Column:
    """Where a record has its document.

    Attributes:
        key: the key in a JSON line, or the name of the column of a table.
        document: returns the document of a value. Its second argument names the value in errors,
            which are of the type ``UserError``.
        identity: what the document depends on in addition to the value, as JSON takes it.
    """

    key: str
    document: Callable[[object, str], str]
    identity: object = None

    def of_record(self, record: object, where: str) -> str:
        """Return the document of a JSON object."""
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object: write one with the key {self.key!r}")
        if self.key not in record:
            raise self.missing(where, "key", list(record))
        return self.document(record[self.key], f"{where} under {self.key!r}")

    def missing(self, where: str, kind: str, names: list[str]) -> UserError:
        """Return the error for a file that lacks the column."""
        listed = ", ".join(repr(name) for name in names[:8]) or "none"
        return UserError(
            f"{where} has no {kind} {self.key!r} (its {kind}s: {listed}): set data.text_key "
            "(--text-key of the tools)"
        )


def plain_text(value: object, where: str) -> str:
    """Return a value that is the document itself.

    Raises:
        UserError: the value is not a string, or cannot be encoded as UTF-8.
    """
    if not isinstance(value, str):
        raise UserError(f"{where} has a {type(value).__name__}: the text must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half of a surrogate pair at character {error.start}: "
            "correct or remove it"
        ) from error
    return value


def text_column(key: str) -> Column:
    """Return the column of a text."""
    return Column(key, plain_text)


# The documents of a file, each with the number of bytes that were read for it.
Documents = Iterator[tuple[str, int]]


def read_file(file: Path, column: Column) -> Documents:
    """Yield the documents of a file, each with the number of bytes that were read for it.

    Raises:
        OSError: the file cannot be read.
        UserError: the file is damaged or not UTF-8, a record has no document, or a package that
            reads the format is missing.
    """
    try:
        yield from _FORMATS[suffix_of(file)](file, column)
    except (EOFError, zlib.error, OSError) as error:
        # Errors of the operating system have a number; those of gzip and pyarrow have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(file, error) from error


def suffix_of(path: Path) -> str:
    """Return the suffix that says how a file is read: the last, or the last two if compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    count = 2 if suffixes and suffixes[-1] in _COMPRESSIONS else 1
    return "".join(suffixes[-count:])


def _read_text(file: Path, column: Column) -> Documents:
    with _open(file) as (stream, _):
        raw = stream.read()
    yield _decode(raw, f"data file {file}"), file.stat().st_size


def _read_json_lines(file: Path, column: Column) -> Documents:
    read = 0
    with _open(file) as (stream, position):
        for number, raw in enumerate(stream, 1):
            where = f"{file} line {number}"
            line = _decode(raw, where)
            size, read = position() - read, position()
            yield (column.of_record(_parse(line, where), where) if line.strip() else ""), size


def _parse(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): correct or remove it") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}): "
            "convert it to UTF-8"
        ) from error


@contextlib.contextmanager
def _open(file: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Open a file that may be compressed; the second value returns the position in the file."""
    with open(file, "rb") as raw:
        stream: Any = raw
        if file.suffix.lower() == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif file.suffix.lower() == ".zst":
            unpacked = _pyarrow(file).CompressedInputStream(raw, "zstd")
            stream = io.BufferedReader(unpacked)
        yield stream, raw.tell


def _read_parquet(file: Path, column: Column) -> Documents:
    _pyarrow(file)
    from pyarrow import parquet

    with _damage(file), parquet.ParquetFile(file, memory_map=True) as table:
        _check_column(file, column, table.schema_arrow)
        batches = table.iter_batches(_ROWS, columns=[column.key])
        yield from _read_batches(file, column, batches)


def _read_arrow(file: Path, column: Column) -> Documents:
    pyarrow = _pyarrow(file)
    from pyarrow import ipc

    with _damage(file), pyarrow.memory_map(str(file)) as source:
        try:
            table = ipc.open_file(source)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        except pyarrow.ArrowInvalid:
            # The package datasets writes streams, which have no table of contents.
            source.seek(0)
            table = batches = ipc.open_stream(source)
        _check_column(file, column, table.schema)
        yield from _read_batches(file, column, batches)


def _read_batches(file: Path, column: Column, batches: Iterator) -> Documents:
    row = 0
    for batch in batches:
        values = batch.column(column.key)
        # Offsets into other memory and text that is not UTF-8 are read without a check otherwise.
        values.validate(full=True)
        for start in range(0, len(values), _ROWS):
            part = values.slice(start, _ROWS)
            size = part.nbytes // max(1, len(part))
            for value in part.to_pylist():
                row += 1
                where = f"{file} row {row} under {column.key!r}"
                yield column.document(value, where), size


def _check_column(file: Path, column: Column, schema) -> None:
    if column.key not in schema.names:
        raise column.missing(str(file), "column", list(schema.names))


@contextlib.contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Raise an error of pyarrow in the block as a ``UserError``."""
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"data file {file} is damaged ({reason_of(error)}): copy it again")


def _pyarrow(file: Path):
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"data file {file} needs the package pyarrow: install it with "
            "pip install 'megalard[data]'"
        ) from error
    return pyarrow


_FORMATS: dict[str, Callable[[Path, Column], Documents]] = {
    **{suffix: _read_text for suffix in TEXT_SUFFIXES},
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
_FORMATS |= {
    suffix + compression: _FORMATS[suffix]
    for suffix in (*TEXT_SUFFIXES, ".jsonl")
    for compression in _COMPRESSIONS
}
# The suffixes of files that are read.
SUFFIXES = tuple(_FORMATS)
