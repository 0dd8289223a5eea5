"""Documents from every format of file, and what is wrong with a file in one sentence."""

from __future__ import annotations

import gzip
import sys

import pyarrow
import pytest
from pyarrow import ipc, parquet

from megalard.data.formats import read_file, suffix_of, text_column
from megalard.data.sources import read_documents, total_bytes
from tests.command_line import user_error

TEXTS = ["one", "two\nlines, é", "", "x" * 5000]


def zstd(path, data):
    with pyarrow.output_stream(path, compression="zstd") as stream:
        stream.write(data)


def gz(path, data):
    path.write_bytes(gzip.compress(data))


def table(texts=TEXTS, key="text"):
    return pyarrow.table({"id": list(range(len(texts))), key: texts})


def write_parquet(path):
    # More row groups than one, as large files have.
    parquet.write_table(table(), path, row_group_size=3)


def write_stream(path):
    with ipc.new_stream(path, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)


def write_file(path):
    with ipc.new_file(path, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)


def documents(path, key="text"):
    return [text for text, _ in read_file(path, text_column(key))]


@pytest.mark.parametrize(
    ("suffix", "write"),
    [(".parquet", write_parquet), (".arrow", write_stream), (".ARROW", write_file)],
)
def test_tables_give_a_document_per_row(suffix, write, tmp_path):
    path = tmp_path / f"data{suffix}"
    write(path)
    assert documents(path) == TEXTS
    # Blank documents are skipped.
    assert list(read_documents([tmp_path])) == [TEXTS[0], TEXTS[1], TEXTS[3]]


def test_long_tables_give_every_row(tmp_path):
    """Rows are read 256 at a time."""
    texts = [str(row) for row in range(600)]
    parquet.write_table(table(texts), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == texts


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gz), (".zst", zstd)])
def test_compressed_text_is_read_as_the_text(suffix, pack, tmp_path):
    lines = b'{"text": "one"}\n\n{"text": "two"}\n'
    pack(tmp_path / f"a.jsonl{suffix}", lines)
    pack(tmp_path / f"b.txt{suffix}", "three é".encode())
    read = []
    assert list(read_documents([tmp_path], advance=read.append)) == ["one", "two", "three é"]
    assert 0 < sum(read) <= total_bytes([tmp_path])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_not_part_of_the_text(suffix, tmp_path):
    """Windows writes one at the start of a file."""
    path = tmp_path / f"a{suffix}"
    text = "é" if suffix == ".txt" else '{"text": "é"}\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert documents(path) == ["é"]


def test_the_suffix_of_a_compressed_file_has_two_parts(tmp_path):
    names = {
        "a.jsonl": ".jsonl",
        "v1.2.JSONL.GZ": ".jsonl.gz",
        "a.gz": ".gz",
        "a": "",
        "b.c.d": ".d",
    }
    assert {name: suffix_of(tmp_path / name) for name in names} == names


@pytest.mark.parametrize("write", [write_parquet, write_stream])
def test_a_missing_column_is_refused_with_the_columns_that_there_are(write, tmp_path):
    path = tmp_path / ("a.parquet" if write is write_parquet else "a.arrow")
    write(path)
    sentence = user_error(documents, path, "body")
    assert sentence == (
        f"{path} has no column 'body' (its columns: 'id', 'text'): set data.text_key "
        "(--text-key of the tools)"
    )
    assert "row 1 under 'id' has a int: the text must be a string" in user_error(
        documents, path, "id"
    )


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl.gz", ".txt.zst"])
@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_damaged_file_is_refused_in_one_sentence(suffix, damage, tmp_path):
    path = tmp_path / f"a{suffix}"
    if damage == "text":
        path.write_bytes(b"this is not what the name says" * 9)
    else:
        data = b'{"text": "one"}\n' * 5000
        {
            ".parquet": write_parquet,
            ".arrow": write_file,
            ".jsonl.gz": lambda path: gz(path, data),
            ".txt.zst": lambda path: zstd(path, data),
        }[suffix](path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert user_error(documents, path).startswith(f"data file {path} is damaged (")


@pytest.mark.parametrize("write", [write_file, write_stream])
@pytest.mark.parametrize("damage", ["text", "offsets"])
def test_damage_inside_an_arrow_file_is_refused_in_one_sentence(write, damage, tmp_path):
    """pyarrow reads text that is not UTF-8, and memory beyond the file, without a check."""
    path = tmp_path / "a.arrow"
    write(path)
    content = path.read_bytes()
    before, after = (b"x" * 5000, b"\xff" * 5000)
    if damage == "offsets":
        # The offsets of the last text, which are the last place with these bytes.
        before = (0).to_bytes(4, "little") + (5000).to_bytes(4, "little")
        after = (0).to_bytes(4, "little") + (2**31 - 1).to_bytes(4, "little")
    place = content.rindex(before)
    path.write_bytes(content[:place] + after + content[place + len(before) :])
    assert user_error(documents, path).startswith(f"data file {path} is damaged (")


def test_without_pyarrow_the_fix_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert user_error(documents, tmp_path / "a.parquet") == (
        f"data file {tmp_path / 'a.parquet'} needs the package pyarrow: install it with "
        "pip install 'megalard[data]'"
    )
