"""Tokenizers are read from their files as they are written, and errors are one sentence."""

from __future__ import annotations

import hashlib
import re

import pytest
import sentencepiece

from megalard.data.tokenizer import load_tokenizer
from megalard.errors import UserError
from tests.small_tokenizers import CORPUS, save_fast_tokenizer


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """The directory of a small sentencepiece model."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


def test_nothing_is_added_truncated_or_padded(tmp_path):
    folder = save_fast_tokenizer(
        tmp_path / "m", eos_token="</s>", tokenizer_class="Qwen2TokenizerFast"
    )
    tokenizer = load_tokenizer(folder)
    texts = ["the quick brown fox jumps over", "é", ""]
    rows = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    assert len(rows[0]) > 4 and rows[2] == [] and 0 not in rows[0]
    assert tokenizer.eos_id == 1
    assert tokenizer.vocab_size == 300
    content = (folder / "tokenizer.json").read_bytes()
    assert tokenizer.fingerprint == hashlib.sha256(content).hexdigest()
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]


def test_remote_code_is_not_run(tmp_path):
    folder = save_fast_tokenizer(
        tmp_path / "m",
        eos_token="</s>",
        tokenizer_class="Custom",
        auto_map={"AutoTokenizer": ["custom.Custom", "custom.Custom"]},
    )
    (folder / "custom.py").write_text("raise SystemExit('remote code ran')")
    assert load_tokenizer(folder).eos_id == 1


@pytest.mark.parametrize("eos", [1, [1, 0]])
def test_the_end_token_may_be_named_by_the_model_config(tmp_path, eos):
    folder = save_fast_tokenizer(tmp_path / "m", {"model_type": "llama", "eos_token_id": eos})
    assert load_tokenizer(folder).eos_id == 1


def test_a_sentencepiece_model_is_read_directly(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    texts = ["the lazy dog", "unseen: é"]
    rows = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    assert all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for row in rows for i in row)
    assert tokenizer.eos_id == 2 and not any({1, 2}.intersection(row) for row in rows)
    content = (sentencepiece_model / "tokenizer.model").read_bytes()
    assert tokenizer.fingerprint == hashlib.sha256(content).hexdigest()
    assert [file.name for file in tokenizer.files] == ["tokenizer.model"]


def test_a_tokenizer_that_cannot_be_loaded_is_named_in_one_sentence(tmp_path):
    def raises(folder, message):
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(folder)
        assert "\n" not in str(caught.value) and re.search(
            re.escape(str(folder)), str(caught.value)
        )

    raises(tmp_path / "missing", "does not exist")
    raises(tmp_path, "neither tokenizer.json nor tokenizer.model")
    raises(save_fast_tokenizer(tmp_path / "no_eos"), "has no end token")
    raises(
        save_fast_tokenizer(tmp_path / "far", {"model_type": "llama", "eos_token_id": 999}),
        "eos id 999",
    )
    for name, message in [
        ("tokenizer.json", "as a tokenizer"),
        ("tokenizer.model", "sentencepiece"),
    ]:
        folder = tmp_path / f"damaged_{name}"
        folder.mkdir()
        (folder / name).write_bytes(b"{ not it")
        raises(folder, message)
