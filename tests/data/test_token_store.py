import json

import numpy as np
import pytest
from data_helpers import EOS, make_byte_tokenizer

from megalard.data import token_file
from megalard.data.token_store import TokenStore
from megalard.data.token_store_writer import build_store, write_store
from megalard.errors import UserError


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cde", "é")))
    return file


def test_store_holds_every_document_and_its_eos(tmp_path, text_file, byte_tokenizer):
    store = build_store([text_file], byte_tokenizer, tmp_path / "deep" / "store")
    expected = [*b"ab", EOS, *b"cde", EOS, *"é".encode(), EOS]
    assert store.tokens.tolist() == expected
    assert isinstance(store.tokens, np.memmap) and not store.tokens.flags.writeable
    assert store.tokens.dtype == np.uint16
    assert store.documents.tolist() == [0, 3, 7, 10] and store.documents.dtype == np.int64
    assert store.read(1, 4).tolist() == expected[1:4] and store.read(1, 4).dtype == np.int64
    assert store.eos_id == EOS and store.largest_id == EOS and store.vocab_size == EOS + 1
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["store"]


def test_batches_do_not_change_the_store(tmp_path, byte_tokenizer, monkeypatch):
    texts = [chr(97 + i) * (i + 1) for i in range(20)]
    one = write_store(texts, byte_tokenizer, tmp_path / "one", "s")
    monkeypatch.setattr(token_file, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(token_file, "BATCH_CHARACTERS", 30)
    many = write_store(iter(texts), byte_tokenizer, tmp_path / "many", "s")
    assert np.array_equal(one.tokens, many.tokens)
    assert np.array_equal(one.documents, many.documents)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32), (200_000, np.uint32)]
)
def test_dtype_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    tokenizer = make_byte_tokenizer(vocab_size - 1, vocab_size)
    store = write_store(["a"], tokenizer, tmp_path / "store", "s")
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [97, vocab_size - 1]


def test_same_store_is_reused_and_another_is_refused(tmp_path, text_file, byte_tokenizer):
    output = tmp_path / "store"
    build_store([text_file], byte_tokenizer, output)
    written = (output / "tokens.bin").stat().st_mtime_ns
    build_store([text_file], byte_tokenizer, output)
    assert (output / "tokens.bin").stat().st_mtime_ns == written

    with pytest.raises(UserError, match="was made with another tokenizer"):
        build_store([text_file], make_byte_tokenizer(name="other"), output)
    with pytest.raises(UserError, match="from other sources"):
        build_store([text_file], byte_tokenizer, output, text_key="body")
    text_file.write_text('{"text": "changed"}\n')
    with pytest.raises(UserError, match="from other sources, or they have changed"):
        build_store([text_file], byte_tokenizer, output)
    assert (output / "tokens.bin").stat().st_mtime_ns == written


def test_output_that_holds_something_else_is_left_alone(tmp_path, text_file, byte_tokenizer):
    output = tmp_path / "results"
    output.mkdir()
    (output / "precious.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty and holds no token store"):
        build_store([text_file], byte_tokenizer, output)
    with pytest.raises(UserError, match="holds no token store"):
        build_store([text_file], byte_tokenizer, text_file)
    with pytest.raises(UserError, match="cannot be written"):
        build_store([text_file], byte_tokenizer, text_file / "below_a_file")
    assert [p.name for p in output.iterdir()] == ["precious.txt"]


def test_empty_output_folder_is_filled(tmp_path, text_file, byte_tokenizer):
    (tmp_path / "store").mkdir()
    assert len(build_store([text_file], byte_tokenizer, tmp_path / "store").tokens) == 10


@pytest.mark.parametrize("stop", [KeyboardInterrupt, UserError, OSError(28, "No space left")])
def test_interrupted_write_leaves_nothing(tmp_path, byte_tokenizer, monkeypatch, stop):
    monkeypatch.setattr(token_file, "BATCH_DOCUMENTS", 1)

    def documents():
        yield "first"
        assert any((tmp_path / "runs").iterdir()), "the write should be under way"
        raise stop

    with pytest.raises((KeyboardInterrupt, UserError)):
        write_store(documents(), byte_tokenizer, tmp_path / "runs" / "store", "s")
    assert not list((tmp_path / "runs").iterdir())


def test_killed_write_is_not_taken_for_a_store(tmp_path, text_file, byte_tokenizer, monkeypatch):
    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(token_file, "_move_into_place", killed)
        patch.setattr(token_file.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            build_store([text_file], byte_tokenizer, tmp_path / "store")
    assert len(list(tmp_path.glob(".store.partial-*"))) == 1
    with pytest.raises(UserError, match="is not a token store"):
        TokenStore.open(tmp_path / "store")
    assert len(build_store([text_file], byte_tokenizer, tmp_path / "store").tokens) == 10


def test_process_that_finishes_second_opens_the_first_ones_store(tmp_path, byte_tokenizer):
    output = tmp_path / "store"

    def documents():
        yield "same"
        write_store(["same"], byte_tokenizer, output, "s")

    assert len(write_store(documents(), byte_tokenizer, output, "s").tokens) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["store"]

    def others():
        yield "same"
        write_store(["same"], byte_tokenizer, tmp_path / "second", "t")

    with pytest.raises(UserError, match="from other sources"):
        write_store(others(), byte_tokenizer, tmp_path / "second", "s")


def test_no_document_is_an_error(tmp_path, byte_tokenizer):
    with pytest.raises(UserError, match="no document"):
        write_store([], byte_tokenizer, tmp_path / "store", "s")
    assert not list(tmp_path.iterdir())


def edit_meta(store, **changes):
    meta = json.loads((store.path / "meta.json").read_text())
    (store.path / "meta.json").write_text(json.dumps(meta | changes))


def save_documents(store, array):
    np.save(store.path / "documents.npy", array)


POISONS = {
    "truncated": (
        lambda s: (s.path / "tokens.bin").write_bytes(b"\0" * 6),
        "truncated: .* 6 bytes",
    ),
    "longer": (lambda s: (s.path / "tokens.bin").write_bytes(b"\0" * 60), "60 bytes where"),
    "no tokens": (lambda s: (s.path / "tokens.bin").unlink(), "is damaged"),
    "no offsets": (lambda s: (s.path / "documents.npy").unlink(), "is damaged"),
    "bad offsets": (lambda s: (s.path / "documents.npy").write_bytes(b"junk"), "is damaged"),
    "empty offsets": (lambda s: (s.path / "documents.npy").write_bytes(b""), "is damaged"),
    "pickle": (lambda s: save_documents(s, np.array([{}, 3], object)), "is damaged"),
    "backward": (lambda s: save_documents(s, np.array([0, 7, 3, 10])), "does not divide"),
    "short": (lambda s: save_documents(s, np.array([0, 3, 7, 9])), "does not divide"),
    "count": (lambda s: edit_meta(s, documents=2), "does not divide"),
    "float": (lambda s: save_documents(s, np.array([0.0, 3, 7, 10])), "does not divide"),
    "no meta": (lambda s: (s.path / "meta.json").unlink(), "is not a token store"),
    "bad meta": (lambda s: (s.path / "meta.json").write_text("{"), "cannot be read"),
    "other json": (lambda s: (s.path / "meta.json").write_text("[]"), "does not describe"),
    "version": (lambda s: edit_meta(s, version=2), "has version 2"),
    "dtype": (lambda s: edit_meta(s, dtype="float64"), "dtype float64"),
    "field": (lambda s: edit_meta(s, tokens="10"), "'10' for tokens"),
    "negative": (lambda s: edit_meta(s, tokens=-1), "-1 for tokens"),
}


@pytest.mark.parametrize("poison", POISONS)
def test_damaged_store_is_refused(make_store, poison):
    store = make_store([3, 4, 3])
    damage, message = POISONS[poison]
    damage(store)
    with pytest.raises(UserError, match=message):
        TokenStore.open(store.path)


def test_foreign_ids_are_caught_when_read(make_store):
    store = make_store([3, 4, 3])
    tokens = np.fromfile(store.path / "tokens.bin", np.uint16)
    tokens[5] = 60_000
    tokens.tofile(store.path / "tokens.bin")
    store = TokenStore.open(store.path)
    assert len(store.read(0, 5)) == 5
    with pytest.raises(UserError, match="id 60000 between tokens 4 and 8"):
        store.read(4, 8)


def test_store_of_another_model_is_refused(make_store, byte_tokenizer):
    store = make_store([3, 4])
    store.check_tokenizer(byte_tokenizer)
    other = make_byte_tokenizer(name="other")
    with pytest.raises(UserError) as caught:
        store.check_tokenizer(other)
    for tokenizer in (byte_tokenizer, other):
        assert tokenizer.fingerprint[:12] in str(caught.value)
    with pytest.raises(UserError, match="with id 256 but the model's eos id is 5"):
        store.check_tokenizer(make_byte_tokenizer(eos_id=5))
    store.check_vocabulary(EOS + 1)
    with pytest.raises(UserError, match="holds the id 256 but the model has only 256 rows"):
        store.check_vocabulary(EOS)
