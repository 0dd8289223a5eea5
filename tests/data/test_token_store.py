"""Reading a token store: damage is found when it is opened or read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megalard.data.token_store import TokenStore
from megalard.errors import RankError, UserError
from tests.small_tokenizers import EOS, make_byte_tokenizer


def edit_meta(store, **changes):
    """Change entries of the store's meta.json."""
    meta = json.loads((store.path / "meta.json").read_text())
    (store.path / "meta.json").write_text(json.dumps(meta | changes))


def save_documents(store, array):
    """Replace the store's document offsets."""
    np.save(store.path / "documents.npy", array)


DAMAGE = {
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


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_refused(make_store, kind):
    store = make_store([3, 4, 3])
    damage, message = DAMAGE[kind]
    damage(store)
    with pytest.raises(UserError, match=message):
        TokenStore.open(store.path)


def test_an_id_that_was_never_written_is_found_when_it_is_read(make_store):
    store = make_store([3, 4, 3])
    tokens = np.fromfile(store.path / "tokens.bin", np.uint16)
    tokens[5] = 60_000
    tokens.tofile(store.path / "tokens.bin")
    store = TokenStore.open(store.path)
    assert len(store.read(0, 5)) == 5
    with pytest.raises(RankError, match="id 60000 between tokens 4 and 8"):
        store.read(4, 8)


def test_a_store_of_another_model_is_refused(make_store, byte_tokenizer):
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
