"""Read and write safetensors files, one tensor or one slice at a time.

Files are read with ``pread`` and not memory-mapped, so that a process holds what it asked for and
no more, however large the file is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from megalard.errors import UserError, shown
from megalard.files.reading import check_regular
from megalard.files.writing import Progress, no_progress

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_HEADER_LIMIT = 100 * 2**20  # bytes; the limit of the safetensors library
_BLOCK_BYTES = 32 * 2**20


class DamagedFile(ValueError):
    """A safetensors file that does not hold what its header or its size promises."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        start: position of the tensor's first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file.

    Attributes:
        path: the file.
        entries: tensor name to ``Entry``.
        metadata: the free text entries of the header.

    Raises:
        DamagedFile: the header is not a safetensors header, or the file has another length than
            the header says.
        UserError: a tensor has a dtype that is not in ``DTYPES``, or the path is not a regular
            file.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check_regular(self.path)
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (open as long as this)
        try:
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or not 0 < length <= min(_HEADER_LIMIT, size - 8):
            raise DamagedFile("it has no safetensors header")
        try:
            header = json.loads(self._file.read(length))
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict):
                raise ValueError
            entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedFile("its header is not a safetensors header") from None
        expected = 8 + length
        for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.nbytes)):
            if entry.start != expected:
                raise DamagedFile("its header leaves gaps between tensors")
            expected += entry.nbytes
        if size != expected:
            raise DamagedFile(f"it has {size} bytes, its header promises {expected}")
        return entries, metadata

    def _entry(self, name: str, value: dict, base: int) -> Entry:
        """Return the entry of one tensor; ``base`` is where the tensors begin in the file."""
        start, end = value["data_offsets"]
        shape = value["shape"]
        if type(shape) is not list or any(type(n) is not int or n < 0 for n in (*shape, start)):
            raise ValueError
        if isinstance(value["dtype"], str) and value["dtype"] not in DTYPES:
            raise UserError(
                f"{self.path} has the tensor {shown(name)} of dtype {shown(value['dtype'])}, which "
                f"is not supported: convert it to one of {', '.join(DTYPES)}, or leave it out"
            )
        entry = Entry(DTYPES[value["dtype"]], tuple(shape), base + start)
        # torch counts the elements of each dimension in 64 bits, also for tensors without elements.
        if type(end) is not int or entry.nbytes != end - start or math.prod(map(_one, shape)) >> 62:
            raise ValueError
        return entry

    def keys(self) -> list[str]:
        """Return the names of the tensors in the order of the header."""
        return list(self.entries)

    def get_slice(self, name: str) -> TensorSlice:
        """Return a tensor that is read by index, as the safetensors library does."""
        return TensorSlice(self, name)

    def read(
        self, name: str, start: tuple[int, ...] | None = None, size: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Return the tensor, or its box of ``size`` at ``start``, as a new tensor on the CPU."""
        entry = self.entries[name]
        start = start if start is not None else (0,) * len(entry.shape)
        size = tuple(size) if size is not None else entry.shape
        out = torch.empty(size, dtype=entry.dtype)
        if out.numel() == 0:
            return out
        row = math.prod(entry.shape[1:])
        if size[1:] == entry.shape[1:]:
            first_element = start[0] * row if size else 0
            self._fill(out, entry.start + first_element * entry.dtype.itemsize)
            return out
        # Blocks of complete rows are read, and the wanted columns are copied out of them.
        rows = max(1, _BLOCK_BYTES // (row * entry.dtype.itemsize))
        box = tuple(slice(a, a + n) for a, n in zip(start[1:], size[1:], strict=True))
        for number in range(0, size[0], rows):
            count = min(rows, size[0] - number)
            block = torch.empty(count, *entry.shape[1:], dtype=entry.dtype)
            offset = (start[0] + number) * row * entry.dtype.itemsize
            self._fill(block, entry.start + offset)
            out[number : number + count] = block[(slice(None), *box)]
        return out

    def _fill(self, out: torch.Tensor, offset: int) -> None:
        view = as_bytes(out)
        while view:
            count = os.preadv(self._file.fileno(), [view[: 2**30]], offset)
            if count == 0:
                raise DamagedFile("it became shorter while it was read")
            view, offset = view[count:], offset + count


def _one(size: int) -> int:
    return max(1, size)


@dataclass(frozen=True)
class TensorSlice:
    """One tensor of a file, read by ``[:]``, ``[a:b]`` or ``[:, a:b]``."""

    file: TensorFile
    name: str

    def get_shape(self) -> list[int]:
        return list(self.file.entries[self.name].shape)

    def get_dtype(self) -> str:
        return NAMES[self.file.entries[self.name].dtype]

    def __getitem__(self, index) -> torch.Tensor:
        shape = self.file.entries[self.name].shape
        index = index if isinstance(index, tuple) else (index,)
        start, size = [0] * len(shape), list(shape)
        for dim, part in enumerate(index[: len(shape)]):
            low, high, step = part.indices(shape[dim])
            assert step == 1, "slices have no step"
            start[dim], size[dim] = low, max(0, high - low)
        return self.file.read(self.name, tuple(start), tuple(size))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def in_file_order(tensors: Mapping[str, Entry]) -> list[str]:
    """Return the names by decreasing element size, so that every tensor of a file is aligned."""
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


class TensorFileWriter:
    """Writes one file, tensor after tensor, and computes its checksum meanwhile.

    Args:
        path: the file, which must not exist.
        entries: name, dtype and shape of every tensor, in the order in which they are written.
        metadata: the free text entries of the header.
        progress: called with the number of bytes of each part that was written.
        checksum: whether to compute the sha256.

    Raises:
        OSError: the file exists or the disk is full; ``write`` and ``close`` raise it too.
    """

    def __init__(
        self,
        path: str | Path,
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str],
        progress: Progress = no_progress,
        checksum: bool = True,
    ):
        header: dict = {"__metadata__": dict(metadata)}
        offset = 0
        for name, entry in entries.items():
            header[name] = {
                "dtype": NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._expected = list(entries.items())
        self._progress = progress
        self._digest = hashlib.sha256() if checksum else None
        self._size = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        # One thread hashes and one starts the write-back while the caller fetches the next tensor.
        self._helpers = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
        self._hashed: Future | None = None
        self._flushed: Future | None = None
        self._unflushed = 0
        try:
            self._put(memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self.abandon()
            raise

    def write(self, tensor: torch.Tensor) -> None:
        """Append the next tensor, which must have the dtype and shape of its entry."""
        name, entry = self._expected.pop(0)
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), name
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.numel():
            self._put(as_bytes(tensor))

    def _put(self, view: memoryview) -> None:
        if self._digest is not None:
            self._hashed = self._helpers[0].submit(self._digest.update, view)
        self._size += len(view)
        while view:
            count = os.write(self._file, view[:_BLOCK_BYTES])
            view = view[count:]
            self._progress(count)
            self._unflushed += count
            if self._unflushed > 8 * _BLOCK_BYTES and (
                self._flushed is None or self._flushed.done()
            ):
                self._check_flushed()
                self._flushed = self._helpers[1].submit(os.fdatasync, self._file)
                self._unflushed = 0
        # Without this wait three tensors would be in memory: this one, the one that is being read
        # ahead, and the next one to be written.
        self._wait_for_hash()

    def _wait_for_hash(self) -> None:
        if self._hashed is not None:
            self._hashed.result()
        self._hashed = None

    def _check_flushed(self) -> None:
        if self._flushed is not None:
            self._flushed.result()

    def close(self) -> tuple[int, str | None]:
        """Wait until the file is on the disk; return its size in bytes and its sha256."""
        try:
            assert not self._expected, f"{len(self._expected)} tensors were not written"
            self._wait_for_hash()
            self._check_flushed()
            os.fsync(self._file)
        finally:
            self.abandon()
        return self._size, self._digest.hexdigest() if self._digest else None

    def abandon(self) -> None:
        """Close the file without finishing it; its content is then useless."""
        for helper in self._helpers:
            helper.shutdown(wait=True)
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def write_tensor_file(
    path: str | Path,
    entries: Mapping[str, Entry],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
    progress: Progress = no_progress,
    checksum: bool = True,
) -> tuple[int, str | None]:
    """Write a complete file; return its size in bytes and its sha256 in hexadecimal."""
    writer = TensorFileWriter(path, entries, metadata, progress, checksum)
    try:
        for tensor in tensors:
            writer.write(tensor)
            del tensor  # otherwise it would stay in memory while the next tensors are read
        return writer.close()
    finally:
        writer.abandon()


def read_ahead(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the tensors, fetching each in a thread while the one before it is used."""
    iterator = iter(tensors)
    with ThreadPoolExecutor(1) as thread:
        next_tensor = thread.submit(next, iterator, None)
        while (tensor := next_tensor.result()) is not None:
            next_tensor = thread.submit(next, iterator, None)
            yield tensor
            del tensor
