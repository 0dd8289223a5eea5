"""safetensors files: as the library reads and writes them, and damaged ones are refused."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalard.files.safetensors import (
    DTYPES,
    DamagedFile,
    Entry,
    TensorFile,
    TensorFileWriter,
    as_bytes,
    in_file_order,
    read_ahead,
    write_tensor_file,
)
from tests.command_line import user_error

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "half": torch.arange(6).bfloat16().view(2, 3),
    "empty": torch.zeros(0, 5),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
}


def write(path: Path, tensors: dict[str, torch.Tensor], **options) -> tuple[int, str | None]:
    """Write tensors in the order that keeps them aligned."""
    entries = {name: Entry(x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    order = in_file_order(entries)
    return write_tensor_file(
        path,
        {name: entries[name] for name in order},
        (tensors[name] for name in order),
        {"format": "pt", "note": "x"},
        **options,
    )


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_a_file_is_closed_once(tmp_path):
    """Another file may have its number afterwards."""
    writer = TensorFileWriter(tmp_path / "x", {"x": Entry(torch.float32, (1,))}, {})
    number = writer._file
    writer.abandon()
    with open(os.devnull, "rb") as other:
        assert other.fileno() == number
        standard_output = os.fstat(1)
        writer.abandon()
        assert os.fstat(number) and os.fstat(1) == standard_output


def test_the_library_reads_the_files(tmp_path):
    size, digest = write(tmp_path / "x", TENSORS)
    content = (tmp_path / "x").read_bytes()
    assert size == len(content) and digest == hashlib.sha256(content).hexdigest()
    loaded = load_file(tmp_path / "x")
    assert loaded.keys() == TENSORS.keys()
    assert all(same(loaded[name], value) for name, value in TENSORS.items())
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}


def test_files_of_the_library_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "x", {"a": "b"})
    file = TensorFile(tmp_path / "x")
    assert sorted(file.keys()) == sorted(TENSORS) and file.metadata == {"a": "b"}
    for name, value in TENSORS.items():
        assert same(file.read(name), value)
        part = file.get_slice(name)
        assert part.get_shape() == list(value.shape) and DTYPES[part.get_dtype()] == value.dtype


def test_slices_are_those_of_the_tensor(tmp_path):
    write(tmp_path / "x", TENSORS)
    file, matrix = TensorFile(tmp_path / "x"), TENSORS["matrix"]
    part = file.get_slice("matrix")
    for index in (
        slice(None),
        slice(1, 3),
        slice(2, 2),
        slice(5, 9),
        (slice(None), slice(1, 3)),
        (slice(1, 2), slice(0, 2)),
    ):
        assert same(part[index], matrix[index])
    assert same(file.read("matrix", (1, 2), (2, 1)), matrix[1:3, 2:3])


def test_columns_of_a_large_tensor_are_read_in_blocks_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("megalard.files.safetensors._BLOCK_BYTES", 64)
    sizes, fill = [], TensorFile._fill
    monkeypatch.setattr(
        TensorFile, "_fill", lambda *args: sizes.append(args[1].nbytes) or fill(*args)
    )
    x = torch.arange(120.0).view(20, 6)
    write(tmp_path / "x", {"x": x})
    assert same(TensorFile(tmp_path / "x").get_slice("x")[:, 3:5], x[:, 3:5])
    # Two rows of 24 bytes.
    assert sizes == [48] * 10


def test_tensors_are_aligned_by_the_size_of_their_elements():
    entries = {name: Entry(x.dtype, tuple(x.shape)) for name, x in TENSORS.items()}
    assert in_file_order(entries) == ["scalar", "matrix", "empty", "half", "flags"]


def test_a_file_is_on_the_disk_when_it_is_closed(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or fsync(fd))
    size, digest = write(tmp_path / "x", TENSORS, checksum=False)
    assert synced == [size] and digest is None


def test_an_error_of_the_disk_behind_the_writer_ends_it(tmp_path, monkeypatch):
    """The kernel reports it once: a later fsync would pass."""

    def fail(number):
        raise OSError(5, "Input/output error")

    size, _ = write(tmp_path / "x", TENSORS)
    # Half of the file and a little more is written when the kernel is asked to begin.
    monkeypatch.setattr("megalard.files.safetensors._BLOCK_BYTES", size // 12)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "y", TENSORS)


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "x").write_text("precious")
    with pytest.raises(FileExistsError):
        write(tmp_path / "x", TENSORS)
    assert (tmp_path / "x").read_text() == "precious"


def test_progress_counts_every_byte(tmp_path):
    counts: list[int] = []
    size, _ = write(tmp_path / "x", TENSORS, progress=counts.append)
    assert sum(counts) == size


def test_a_tensor_of_another_shape_is_a_programming_error(tmp_path):
    entries = {"x": Entry(torch.float32, (2,))}
    writer = TensorFileWriter(tmp_path / "x", entries, {})
    with pytest.raises(AssertionError):
        writer.write(torch.zeros(3))
    writer.abandon()
    writer = TensorFileWriter(tmp_path / "y", {"x": Entry(torch.float32, (2,))}, {})
    with pytest.raises(AssertionError, match="1 tensors were not written"):
        writer.close()


def test_the_bytes_of_a_tensor_are_not_copied():
    x = torch.tensor([1, 256], dtype=torch.int16)
    view = as_bytes(x)
    assert bytes(view) == b"\x01\x00\x00\x01"
    view[0] = 5
    assert x[0] == 5


def test_tensors_are_read_one_ahead():
    """While one is used the next one is read, and no more than that."""
    is_read = [threading.Event() for _ in range(4)]

    def tensors():
        for number, event in enumerate(is_read):
            event.set()
            yield torch.tensor(number)

    numbers = []
    for tensor in read_ahead(tensors()):
        numbers.append(number := int(tensor))
        assert is_read[min(number + 1, 3)].wait(60)
        assert not any(event.is_set() for event in is_read[number + 2 :])
    assert numbers == [0, 1, 2, 3]


def test_an_error_while_reading_ahead_is_raised():
    def tensors():
        yield torch.tensor(0)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        list(read_ahead(tensors()))


def with_header(path: Path, header: object, data: bytes = bytes(16)) -> Path:
    """Write a file with a given header, as text or as a value for JSON."""
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    return path


def entry(**changes) -> dict:
    return {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


BAD_HEADERS = {
    "negative": entry(shape=[-2, -2]),
    "floats": entry(shape=[2.0, 2]),
    "bools": entry(shape=[True, 4]),
    "text": entry(shape="4"),
    "another size": entry(shape=[5]),
    "huge and empty": entry(shape=[0, 2**62], data_offsets=[0, 0]),
    "offsets as floats": entry(data_offsets=[0, 16.0]),
    "one offset": entry(data_offsets=[0]),
    "no dtype": {"x": {"shape": [4], "data_offsets": [0, 16]}},
    "dtype of another type": entry(dtype=3),
    "a list": [],
    "deep": "[" * 100_000,
    "null metadata": '{"__metadata__": null}',
    "not JSON": "{ cut",
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_a_bad_header_is_refused(kind, tmp_path):
    path = with_header(tmp_path / "x", BAD_HEADERS[kind])
    with pytest.raises(DamagedFile, match="is not a safetensors header"):
        TensorFile(path)


@pytest.mark.parametrize("content", [b"", b"\x01", bytes(8), (2**40).to_bytes(8, "little") + b"{}"])
def test_a_file_without_a_header_is_refused(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DamagedFile, match="it has no safetensors header"):
        TensorFile(tmp_path / "x")


def test_gaps_and_other_lengths_are_refused(tmp_path):
    with pytest.raises(DamagedFile, match="leaves gaps between tensors"):
        TensorFile(with_header(tmp_path / "a", entry(data_offsets=[4, 20]), bytes(20)))
    path = with_header(tmp_path / "b", entry(), bytes(17))
    with pytest.raises(DamagedFile, match=rf"it has {path.stat().st_size} bytes, its header prom"):
        TensorFile(path)


def test_a_dtype_that_is_not_supported_is_named(tmp_path):
    path = with_header(tmp_path / "x", entry(dtype="F4"))
    sentence = user_error(TensorFile, path)
    assert sentence.startswith(f"{path} has the tensor 'x' of dtype 'F4', which is not supported")


def test_names_from_a_file_are_escaped_and_bounded_in_messages(tmp_path):
    header = {"\x1b[2J" + "y" * 10_000: entry(dtype="F4")["x"]}
    sentence = user_error(TensorFile, with_header(tmp_path / "x", header))
    assert sentence.isprintable() and "\\x1b[2J" in sentence and len(sentence) < 500


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x")
    assert "is not a regular file" in user_error(TensorFile, tmp_path / "x")


def test_a_file_that_becomes_shorter_while_it_is_read_is_found(tmp_path):
    write(tmp_path / "x", TENSORS)
    file = TensorFile(tmp_path / "x")
    os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 3)
    with pytest.raises(DamagedFile, match="it became shorter while it was read"):
        [file.read(name) for name in file.keys()]  # noqa: SIM118
