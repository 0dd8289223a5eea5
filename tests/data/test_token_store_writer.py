"""Writing a token store: complete or not at all, written once, and never over something else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megalard.data import token_store_writer
from megalard.data.boundaries import Boundaries
from megalard.data.token_store import TokenStore
from megalard.data.token_store_writer import build_store
from megalard.errors import UserError
from megalard.files import temporary_folders
from tests.command_line import user_error
from tests.data.documents import store_of
from tests.small_tokenizers import EOS, make_byte_tokenizer


@pytest.fixture
def text_file(tmp_path):
    """A file with three documents."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cde", "é")))
    return file


def test_a_store_has_every_document_with_its_end_token(tmp_path, text_file, byte_tokenizer):
    store = build_store([text_file], byte_tokenizer, tmp_path / "deep" / "store")
    expected = [*b"ab", EOS, *b"cde", EOS, *"é".encode(), EOS]
    assert store.tokens.tolist() == expected
    assert isinstance(store.tokens, np.memmap) and not store.tokens.flags.writeable
    assert store.tokens.dtype == np.uint16
    assert store.documents.tolist() == [0, 3, 7, 10] and store.documents.dtype == np.int64
    assert store.read(1, 4).tolist() == expected[1:4] and store.read(1, 4).dtype == np.int64
    assert store.eos_id == EOS and store.largest_id == EOS and store.vocab_size == EOS + 1
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["store"]


def test_the_store_does_not_depend_on_the_batches_of_tokenization(
    tmp_path, byte_tokenizer, monkeypatch
):
    texts = [chr(97 + i) * (i + 1) for i in range(20)]
    one = store_of(texts, byte_tokenizer, tmp_path / "one")
    monkeypatch.setattr(token_store_writer, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(token_store_writer, "BATCH_CHARACTERS", 30)
    many = store_of(iter(texts), byte_tokenizer, tmp_path / "many")
    assert np.array_equal(one.tokens, many.tokens)
    assert np.array_equal(one.documents, many.documents)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32), (200_000, np.uint32)]
)
def test_the_dtype_depends_on_the_vocabulary(tmp_path, vocab_size, dtype):
    tokenizer = make_byte_tokenizer(vocab_size - 1, vocab_size)
    store = store_of(["a"], tokenizer, tmp_path / "store")
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [97, vocab_size - 1]


def test_the_same_store_is_used_again_and_another_is_refused(tmp_path, text_file, byte_tokenizer):
    output = tmp_path / "store"
    build_store([text_file], byte_tokenizer, output)
    written = (output / "tokens.bin").stat().st_mtime_ns
    build_store([text_file], byte_tokenizer, output)
    # Text that has moved or been touched is the same text.
    moved = tmp_path / "moved.jsonl"
    text_file.rename(moved)
    build_store([moved], byte_tokenizer, output)
    assert (output / "tokens.bin").stat().st_mtime_ns == written

    for tokenizer, boundaries, sentence in (
        (make_byte_tokenizer(name="other"), None, "was made with another tokenizer"),
        (make_byte_tokenizer(eos_id=EOS - 1), None, "was made with another tokenizer"),
        (make_byte_tokenizer(EOS + 1, EOS + 2), None, "was made with another tokenizer"),
        (byte_tokenizer, Boundaries((7,), (EOS,)), "data.bos asks for [7]"),
    ):
        message = user_error(build_store, [moved], tokenizer, output, boundaries=boundaries)
        assert sentence in message
    moved.write_text('{"text": "changed"}\n')
    sentence = user_error(build_store, [moved], byte_tokenizer, output)
    assert "was made from other text, or the text has changed since" in sentence
    assert (output / "tokens.bin").stat().st_mtime_ns == written


def test_every_document_gets_the_special_tokens(tmp_path, text_file, byte_tokenizer):
    boundaries = Boundaries((7, 8), ())
    store = build_store([text_file], byte_tokenizer, tmp_path / "s", boundaries=boundaries)
    assert store.tokens.tolist() == [7, 8, *b"ab", 7, 8, *b"cde", 7, 8, *"é".encode()]
    assert store.boundaries == boundaries and store.documents.tolist() == [0, 4, 9, 13]


def test_files_that_are_passed_over_are_a_warning(tmp_path, byte_tokenizer):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("some text")
    (tmp_path / "data" / "b.csv").write_text("x")
    warnings: list[str] = []
    build_store([tmp_path / "data"], byte_tokenizer, tmp_path / "store", warn=warnings.append)
    assert warnings == [
        f"1 files of 1 bytes (.csv), such as {tmp_path / 'data' / 'b.csv'} are not text that is "
        "read, and are passed over"
    ]


def test_an_output_with_something_else_is_left_alone(tmp_path, text_file, byte_tokenizer):
    output = tmp_path / "results"
    output.mkdir()
    (output / "precious.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty and is not a token store"):
        build_store([text_file], byte_tokenizer, output)
    with pytest.raises(UserError, match="is not a token store"):
        build_store([text_file], byte_tokenizer, text_file)
    with pytest.raises(UserError, match="cannot be written"):
        build_store([text_file], byte_tokenizer, text_file / "below_a_file")
    assert [p.name for p in output.iterdir()] == ["precious.txt"]


def test_an_empty_output_directory_is_filled(tmp_path, text_file, byte_tokenizer):
    (tmp_path / "store").mkdir()
    assert len(build_store([text_file], byte_tokenizer, tmp_path / "store").tokens) == 10
    assert not list(tmp_path.glob(".store.partial-*"))


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), UserError("x"), OSError(28, "No space left")], ids=repr
)
def test_an_interrupted_write_leaves_nothing(tmp_path, byte_tokenizer, monkeypatch, stop):
    monkeypatch.setattr(token_store_writer, "BATCH_DOCUMENTS", 1)

    def documents():
        yield "first"
        assert any((tmp_path / "runs").iterdir()), "the write should be under way"
        raise stop

    with pytest.raises((KeyboardInterrupt, UserError)):
        store_of(documents, byte_tokenizer, tmp_path / "runs" / "store")
    assert not list((tmp_path / "runs").iterdir())


def test_a_killed_write_does_not_look_like_a_store(
    tmp_path, text_file, byte_tokenizer, monkeypatch
):
    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(token_store_writer, "_move_into_place", killed)
        patch.setattr(temporary_folders.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            build_store([text_file], byte_tokenizer, tmp_path / "store")
    assert len(list(tmp_path.glob(".store.partial-*"))) == 1
    with pytest.raises(UserError, match="is not a token store"):
        TokenStore.open(tmp_path / "store")
    assert len(build_store([text_file], byte_tokenizer, tmp_path / "store").tokens) == 10


def test_the_process_that_finishes_second_opens_the_store_of_the_first(tmp_path, byte_tokenizer):
    output = tmp_path / "store"

    def documents():
        yield "same"
        store_of(["same"], byte_tokenizer, output)

    assert len(store_of(documents, byte_tokenizer, output).tokens) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["store"]

    def others():
        yield "same"
        store_of(["same"], byte_tokenizer, tmp_path / "second", "other")

    with pytest.raises(UserError, match="from other text"):
        store_of(others, byte_tokenizer, tmp_path / "second")


def test_text_without_a_document_is_refused(tmp_path, byte_tokenizer):
    with pytest.raises(UserError, match="there is no document to tokenize"):
        store_of([], byte_tokenizer, tmp_path / "store")
    assert not list(tmp_path.iterdir())
