"""A writer of a token store that was stopped goes on where it noted that it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megalard.data import token_files, token_store, token_store_writer
from megalard.data.boundaries import Boundaries
from megalard.data.token_store_writer import write_store
from megalard.errors import UserError
from megalard.files import temporary_folders
from tests.data.documents import Documents
from tests.small_tokenizers import make_byte_tokenizer

TEXTS = [chr(97 + i % 26) * (i + 1) for i in range(30)]


class CountingTokenizer:
    """A tokenizer that counts the documents that it encodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.encoded = tokenizer, 0

    def encode_batch(self, texts):
        self.encoded += len(texts)
        return self._tokenizer.encode_batch(texts)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.fixture
def tokenizer(byte_tokenizer, monkeypatch):
    """A counting tokenizer; a writer notes its progress after every batch of four documents."""
    monkeypatch.setattr(token_store_writer, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(token_files, "_SECONDS_PER_NOTE", -1.0)
    for module in (token_files, token_store):
        monkeypatch.setattr(module, "TOKENS_PER_SUM", 50)
    return CountingTokenizer(byte_tokenizer)


def stopped_after(count: int, texts: list[str] = TEXTS):
    """Return documents of which only some come before the process is stopped."""

    def documents():
        yield from texts[:count]
        raise KeyboardInterrupt

    return documents


def write(texts, tokenizer, folder: Path):
    return write_store(Documents(texts), tokenizer, folder / "store", Boundaries((7,), (256,)))


def partial(folder: Path) -> list[Path]:
    return list(folder.glob(".store.partial-*"))


@pytest.mark.parametrize("count", [5, 17, 30])
def test_a_stopped_writer_goes_on(count, tokenizer, tmp_path):
    expected = write(TEXTS, tokenizer, tmp_path / "whole")
    tokenizer.encoded = 0
    with pytest.raises(KeyboardInterrupt):
        write(stopped_after(count), tokenizer, tmp_path)
    noted = count // 4 * 4
    assert len(partial(tmp_path)) == 1 and tokenizer.encoded == noted
    store = write(TEXTS, tokenizer, tmp_path)
    assert tokenizer.encoded == len(TEXTS), "no document is tokenized twice"
    assert np.array_equal(store.tokens, expected.tokens)
    assert np.array_equal(store.documents, expected.documents)
    assert np.array_equal(store.checksums, expected.checksums) and len(store.checksums) > 5
    for file in sorted(store.path.iterdir()):
        assert file.read_bytes() == (expected.path / file.name).read_bytes(), file.name
    assert partial(tmp_path) == []


def test_a_killed_writer_goes_on_though_its_last_writes_are_not_noted(tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(stopped_after(17), tokenizer, tmp_path)
    (folder,) = partial(tmp_path)
    for name in ("tokens.bin", "lengths.bin"):
        with open(folder / name, "ab") as file:
            file.write(b"more than was noted")
    expected = write(TEXTS, tokenizer, tmp_path / "whole")
    assert np.array_equal(write(TEXTS, tokenizer, tmp_path).tokens, expected.tokens)


@pytest.mark.parametrize(
    "texts",
    [["changed", *TEXTS[1:]], [*TEXTS[:15], "changed", *TEXTS[16:]], TEXTS[:6], TEXTS[::-1]],
)
def test_another_text_is_written_anew(texts, tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(stopped_after(17), tokenizer, tmp_path)
    expected = write(texts, tokenizer, tmp_path / "whole")
    assert np.array_equal(write(texts, tokenizer, tmp_path).tokens, expected.tokens)


def test_another_tokenizer_starts_anew(tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(stopped_after(17), tokenizer, tmp_path)
    other = CountingTokenizer(make_byte_tokenizer(name="other"))
    write(TEXTS, other, tmp_path)
    assert other.encoded == len(TEXTS)


def test_documents_without_tokens_are_not_in_the_store(tokenizer, tmp_path):
    """They count as documents that were read, so that tokenizing resumes at the right one."""
    texts = [text if number % 3 else "" for number, text in enumerate(TEXTS)]

    def write_plain(documents, folder):
        return write_store(Documents(documents), tokenizer, folder / "store", Boundaries())

    expected = write_plain(texts, tmp_path / "whole")
    assert expected.documents.tolist() == np.cumsum([0, *filter(None, map(len, texts))]).tolist()
    with pytest.raises(KeyboardInterrupt):
        write_plain(stopped_after(17, texts), tmp_path)
    assert np.array_equal(write_plain(texts, tmp_path).documents, expected.documents)


def test_other_special_tokens_start_anew(tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(stopped_after(17), tokenizer, tmp_path)
    store = write_store(Documents(TEXTS), tokenizer, tmp_path / "store", Boundaries((9,)))
    assert (store.tokens[store.documents[:-1]] == 9).all() and 7 not in store.tokens


def test_the_files_are_on_the_disk_before_the_record_of_progress_names_their_length(
    tokenizer, tmp_path, monkeypatch
):
    synced_bytes, records = {}, []
    fsync, replace_text = os.fsync, token_files.replace_text

    def noting_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced_bytes[path.name] = os.fstat(descriptor).st_size
        fsync(descriptor)

    def noting_replace(path, text):
        progress = json.loads(text)
        records.append((progress["tokens"] * 2, progress["documents"] * 8, dict(synced_bytes)))
        replace_text(path, text)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(token_files, "replace_text", noting_replace)
    write(TEXTS, tokenizer, tmp_path)
    assert len(records) == 8
    for token_bytes, length_bytes, on_disk in records:
        assert on_disk == {"tokens.bin": token_bytes, "lengths.bin": length_bytes}


@pytest.mark.parametrize("note", ["", "{}", "[1]", '{"identity": 3}'])
def test_a_damaged_note_is_not_used(note, tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(stopped_after(17), tokenizer, tmp_path)
    (folder,) = partial(tmp_path)
    (folder / token_files.NOTE).write_text(note)
    tokenizer.encoded = 0
    write(TEXTS, tokenizer, tmp_path)
    assert tokenizer.encoded == len(TEXTS)


def test_a_folder_of_a_living_writer_is_not_taken(tokenizer, tmp_path):
    target = tmp_path / "store"
    with temporary_folders.temporary_folder(target, token_files.NOTE) as first:
        (first / token_files.NOTE).write_text(json.dumps({}))
        with temporary_folders.temporary_folder(target, token_files.NOTE) as second:
            assert second != first
        temporary_folders.remove_abandoned(target)
        assert first.is_dir()
    assert partial(tmp_path) == []


def test_an_error_keeps_what_was_tokenized(tokenizer, tmp_path):
    def documents():
        yield from TEXTS[:9]
        raise UserError("the network is gone")

    with pytest.raises(UserError, match="the network is gone"):
        write(documents, tokenizer, tmp_path)
    write(TEXTS, tokenizer, tmp_path)
    assert tokenizer.encoded == len(TEXTS) and partial(tmp_path) == []


@pytest.mark.parametrize("name", ["lengths.bin", "tokens.bin"])
@pytest.mark.parametrize("size", [None, 3])
def test_a_note_without_its_files_is_not_used(name, size, tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(stopped_after(17), tokenizer, tmp_path)
    (folder,) = partial(tmp_path)
    if size is None:
        (folder / name).unlink()
    else:
        os.truncate(folder / name, size)
    expected = write(TEXTS, tokenizer, tmp_path / "whole")
    store = write(TEXTS, tokenizer, tmp_path)
    assert np.array_equal(store.tokens, expected.tokens)
    assert np.array_equal(store.documents, expected.documents)
