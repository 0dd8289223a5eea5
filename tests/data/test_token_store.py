"""Reading a token store: damage is found when it is opened or read."""

from __future__ import annotations

import json
import os
import zlib

import numpy as np
import pytest

from megalard.data.boundaries import Boundaries
from megalard.data.token_store import TOKENS_PER_SUM, TokenStore, file_crc32
from megalard.errors import RankError
from tests.command_line import user_error
from tests.small_tokenizers import EOS, make_byte_tokenizer


def edit_meta(store: TokenStore, **changes) -> None:
    """Change entries of the store's meta.json; those that are None are removed."""
    meta = json.loads((store.path / "meta.json").read_text()) | changes
    meta = {key: value for key, value in meta.items() if value is not None}
    (store.path / "meta.json").write_text(json.dumps(meta))


def save_documents(store: TokenStore, array: np.ndarray) -> None:
    """Replace the store's document offsets, with a checksum that holds."""
    np.save(store.path / "documents.npy", array)
    edit_meta(store, documents_crc32=file_crc32(store.path / "documents.npy"))


def in_version_1(store: TokenStore) -> TokenStore:
    """Write a store as version 1 did, without checksums and special tokens; open it."""
    new = ("before", "after", "source_files", "documents_crc32", "checksums_crc32")
    edit_meta(store, version=1, **dict.fromkeys(new))
    (store.path / "checksums.npy").unlink(missing_ok=True)
    return TokenStore.open(store.path)


def write(store: TokenStore, name: str, content: bytes) -> None:
    (store.path / name).write_bytes(content)


def remove(store: TokenStore, name: str) -> None:
    (store.path / name).unlink()


DAMAGE = {
    "truncated": (lambda s: write(s, "tokens.bin", b"\0" * 6), "truncated: tokens.bin has 6 bytes"),
    "longer": (lambda s: write(s, "tokens.bin", b"\0" * 60), "60 bytes where"),
    "no tokens": (lambda s: remove(s, "tokens.bin"), "is damaged"),
    "no offsets": (lambda s: remove(s, "documents.npy"), "documents.npy cannot be read"),
    "bad offsets": (lambda s: write(s, "documents.npy", b"junk"), "is damaged"),
    "empty offsets": (lambda s: write(s, "documents.npy", b""), "is damaged"),
    "pickle": (lambda s: save_documents(s, np.array([{}, 3], object)), "is damaged"),
    "backward": (lambda s: save_documents(s, np.array([0, 7, 3, 10])), "does not divide"),
    "short": (lambda s: save_documents(s, np.array([0, 3, 7, 9])), "does not divide"),
    "count": (lambda s: edit_meta(s, documents=2), "does not divide"),
    "float": (lambda s: save_documents(s, np.array([0.0, 3, 7, 10])), "does not divide"),
    "other offsets": (
        lambda s: np.save(s.path / "documents.npy", np.array([0, 2, 7, 10])),
        "documents.npy is damaged: it does not have its checksum",
    ),
    "no checksums": (lambda s: remove(s, "checksums.npy"), "checksums.npy cannot be read"),
    "bad checksums": (lambda s: write(s, "checksums.npy", b"x"), "does not have its checksum"),
    "no meta": (lambda s: remove(s, "meta.json"), "is not a token store"),
    "bad meta": (lambda s: write(s, "meta.json", b"{"), "cannot be read"),
    "other json": (lambda s: write(s, "meta.json", b"[]"), "does not describe"),
    "version": (lambda s: edit_meta(s, version=3), "has version 3 and this program reads 1 and 2"),
    "dtype": (lambda s: edit_meta(s, dtype="float64"), "dtype float64"),
    "field": (lambda s: edit_meta(s, tokens="10"), "has '10' for tokens"),
    "negative": (lambda s: edit_meta(s, tokens=-1), "has -1 for tokens"),
    "boundaries": (lambda s: edit_meta(s, before=["a"]), "has ['a'] for before"),
    "no field": (lambda s: edit_meta(s, after=None), "has None for after"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_refused(make_store, kind):
    store = make_store([3, 4, 3])
    damage, sentence = DAMAGE[kind]
    damage(store)
    message = user_error(TokenStore.open, store.path)
    assert sentence in message and str(store.path) in message


def test_a_named_pipe_in_place_of_meta_json_is_not_a_store(make_store):
    store = make_store([3, 4, 3])
    remove(store, "meta.json")
    os.mkfifo(store.path / "meta.json")
    assert "is not a token store (no meta.json)" in user_error(TokenStore.open, store.path)


def test_a_changed_token_is_found_when_it_is_first_read(make_store):
    """The checksum of every 65536 tokens is compared."""
    length = TOKENS_PER_SUM + 100
    store = make_store([length, 50])
    assert np.load(store.path / "checksums.npy").tolist() == [
        zlib.crc32(store.tokens[:TOKENS_PER_SUM].tobytes()),
        zlib.crc32(store.tokens[TOKENS_PER_SUM:].tobytes()),
    ]
    tokens = np.fromfile(store.path / "tokens.bin", np.uint16)
    tokens[TOKENS_PER_SUM + 7] ^= 1
    tokens.tofile(store.path / "tokens.bin")
    store = TokenStore.open(store.path)
    assert len(store.read(0, 1000)) == 1000
    with pytest.raises(RankError, match=r"checksum between tokens 65536 and 65686"):
        store.read(length - 3, length)
    with pytest.raises(RankError, match="does not have its checksum"):
        store.read(TOKENS_PER_SUM - 1, TOKENS_PER_SUM + 1)


def test_an_id_that_was_never_written_is_found_in_a_store_without_checksums(make_store):
    store = make_store([3, 4, 3])
    tokens = np.fromfile(store.path / "tokens.bin", np.uint16)
    tokens[5] = 60_000
    tokens.tofile(store.path / "tokens.bin")
    # The tokenizer has the id, but no text that was written.
    edit_meta(store, vocab_size=65_536)
    store = in_version_1(store)
    assert store.version == 1 and store.checksums is None
    assert len(store.read(0, 5)) == 5
    with pytest.raises(RankError, match="id 60000 between tokens 4 and 8"):
        store.read(4, 8)


def test_a_store_of_version_1_has_the_end_token_after_each_document(make_store):
    store = in_version_1(make_store([3, 4]))
    assert store.boundaries == Boundaries((), (EOS,))
    assert store.source_files == store.sources_fingerprint == "text"


def test_the_head_of_a_store_is_a_store(make_store):
    store = make_store([3, 4, 3])
    head = store.head(5)
    assert head.tokens.tolist() == store.tokens[:5].tolist()
    assert head.documents.tolist() == [0, 3, 5]
    assert head.read(2, 5).tolist() == store.tokens[2:5].tolist()
    assert store.head(7).documents.tolist() == [0, 3, 7]
    assert len(store.tokens) == 10, "the store itself is unchanged"


def test_a_store_of_another_tokenizer_is_refused(make_store, byte_tokenizer):
    store = make_store([3, 4])
    store.check_tokenizer(byte_tokenizer)
    other = make_byte_tokenizer(name="other")
    sentence = user_error(store.check_tokenizer, other)
    for tokenizer in (byte_tokenizer, other):
        assert tokenizer.fingerprint[:12] in sentence
    assert "the eos id 256 but the model's eos id is 5" in user_error(
        store.check_tokenizer, make_byte_tokenizer(eos_id=5)
    )
    # Earlier versions knew a tokenizer by its file.
    edit_meta(store, tokenizer=byte_tokenizer.file_fingerprint)
    TokenStore.open(store.path).check_tokenizer(byte_tokenizer)


def test_a_store_with_other_special_tokens_is_refused(make_store):
    store = make_store([3, 4])
    store.check_boundaries(Boundaries((), (EOS,)))
    assert user_error(store.check_boundaries, Boundaries((7,), (EOS,))) == (
        f"token store {store.path} has the ids [] before each document, and data.bos asks for [7]: "
        "set data.bos as the store was made, or tokenize again"
    )
    assert "has the ids [256] after each document, and data.eos asks for []" in user_error(
        store.check_boundaries, Boundaries()
    )


def test_a_model_with_a_smaller_vocabulary_is_refused(make_store):
    store = make_store([3, 4])
    store.check_vocabulary(EOS + 1)
    assert "holds the id 256 but the model has only 256 rows" in user_error(
        store.check_vocabulary, EOS
    )
