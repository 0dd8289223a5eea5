"""Tokenizers give the ids that transformers gives, and errors are one sentence."""

from __future__ import annotations

import hashlib
import json

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megalard.data.tokenizer import has_tokenizer, load_tokenizer
from megalard.errors import UserError
from tests.small_tokenizers import CORPUS, save_byte_tokenizer, save_fast_tokenizer

FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """Return the directory of a small sentencepiece model of Llama 2's form."""
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
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def edit(folder, change):
    """Apply a change to the dictionary in ``tokenizer.json``."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_nothing_is_added_truncated_or_padded(tmp_path):
    folder = save_fast_tokenizer(tmp_path / "m", **FAST)
    tokenizer = load_tokenizer(folder)
    texts = ["the quick brown fox jumps over", "é", ""]
    rows = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    # The file asks for a BOS token, for at most 4 tokens and for at least 8 with padding.
    assert len(rows[0]) > 4 and rows[2] == [] and 0 not in rows[0]
    oracle = PreTrainedTokenizerFast.from_pretrained(folder)
    assert rows == [oracle(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert tokenizer.vocab_size == 300
    assert tokenizer.directory == folder


def test_the_ids_around_a_text_are_read_off_the_tokenizer(tmp_path):
    tokenizer = load_tokenizer(save_fast_tokenizer(tmp_path / "m", **FAST))
    assert (tokenizer.starts_with, tokenizer.ends_with) == ((0,), ())
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.id_of("</s>") == 1
    with pytest.raises(UserError, match="has no token '<end>': choose one of its vocabulary"):
        tokenizer.id_of("<end>")

    folder = save_fast_tokenizer(tmp_path / "both", **FAST)
    template = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]
    special = {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
    post = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": template,
        "special_tokens": special,
    }
    edit(folder, lambda content: content.update(post_processor=post))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.starts_with, tokenizer.ends_with) == ((), (1,))


def test_a_tokenizer_without_bos_and_post_processor_puts_nothing_around_a_text(tmp_path):
    save_byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.starts_with, tokenizer.ends_with) == ((), ())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 256, 257)


@pytest.mark.parametrize(("split", "ids"), [(False, [1]), (True, None)])
def test_special_tokens_in_a_text_are_read_as_transformers_reads_them(tmp_path, split, ids):
    folder = save_fast_tokenizer(tmp_path / "m", **FAST, split_special_tokens=split)
    rows = load_tokenizer(folder).encode_batch(["</s>"])
    oracle = PreTrainedTokenizerFast.from_pretrained(folder)
    assert rows == [oracle("</s>", add_special_tokens=False)["input_ids"]]
    assert (rows == [ids]) if ids else (1 not in rows[0] and len(rows[0]) > 1)


def test_the_fingerprint_is_of_what_determines_the_ids(tmp_path):
    folder = save_fast_tokenizer(tmp_path / "m", **FAST)
    content = (folder / "tokenizer.json").read_bytes()
    first = load_tokenizer(folder)
    assert first.file_fingerprint == hashlib.sha256(content).hexdigest()

    edit(folder, lambda content: content.update(truncation=None, padding=None, post_processor=None))
    second = load_tokenizer(folder)
    assert second.starts_with == () != first.starts_with
    assert second.file_fingerprint != first.file_fingerprint
    assert second.fingerprint == first.fingerprint
    assert second.has_fingerprint(first.fingerprint) and second.has_fingerprint(
        second.file_fingerprint
    )
    assert not second.has_fingerprint(first.file_fingerprint)

    edit(folder, lambda content: content.update(normalizer={"type": "Lowercase"}))
    lowercase = load_tokenizer(folder)
    assert lowercase.fingerprint != first.fingerprint
    edit(folder, lambda content: content["model"]["merges"].pop())
    assert load_tokenizer(folder).fingerprint not in (first.fingerprint, lowercase.fingerprint)


def test_remote_code_is_not_run(tmp_path):
    classes = {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}
    folder = save_fast_tokenizer(tmp_path / "m", **FAST | {"tokenizer_class": "Custom"})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": classes}))
    ran = tmp_path / "ran"
    (folder / "custom.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        load_tokenizer(folder)
    assert not ran.exists()


@pytest.mark.parametrize("eos", [1, [1, 0]])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_the_end_token_may_be_named_by_the_model(tmp_path, eos, file):
    folder = save_fast_tokenizer(tmp_path / "m", tokenizer_class="PreTrainedTokenizerFast")
    (folder / file).write_text(json.dumps({"model_type": "llama", "eos_token_id": eos}))
    assert load_tokenizer(folder).eos_id == 1


def test_a_sentencepiece_model_gives_the_ids_of_transformers(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    oracle = AutoTokenizer.from_pretrained(sentencepiece_model)
    texts = ["the lazy dog", "unseen: é", "two  spaces\n\n"]
    rows = tokenizer.encode_batch(texts)
    assert rows == [oracle(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [tokenizer.decode(row) for row in rows] == texts
    assert all(0 <= i < tokenizer.vocab_size for row in rows for i in row)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert not any({1, 2}.intersection(row) for row in rows)
    assert (tokenizer.starts_with, tokenizer.ends_with) == ((1,), ())
    content = (sentencepiece_model / "tokenizer.model").read_bytes()
    assert tokenizer.file_fingerprint == hashlib.sha256(content).hexdigest()


def test_a_directory_has_a_tokenizer_if_it_has_one_of_its_files(tmp_path):
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    assert has_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_loaded_is_named_in_one_sentence(tmp_path):
    def raises(folder, message):
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    raises(tmp_path / "missing", "does not exist: check its spelling")
    raises(tmp_path, "neither tokenizer.json nor tokenizer.model")
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    raises(save_fast_tokenizer(tmp_path / "no_eos", **fast), "has no end token")
    far = {"model_type": "llama", "eos_token_id": 999}
    raises(save_fast_tokenizer(tmp_path / "far", far, **fast), "eos id 999")
    for name in ("tokenizer.json", "tokenizer.model"):
        folder = tmp_path / f"damaged_{name}"
        folder.mkdir()
        (folder / name).write_bytes(b"{ not it")
        raises(folder, "cannot be loaded by transformers .*: copy its files again")


@pytest.mark.parametrize("place", ["vocabulary", "added token", "decoder"])
def test_an_id_that_no_vocabulary_has_is_refused(place, tmp_path):
    """The library of tokenizers would take memory for every id below it."""
    save_byte_tokenizer(tmp_path)
    if place == "decoder":
        token = {"content": "<x>", "special": True}
        settings = {"eos_token": "</s>", "added_tokens_decoder": {str(2**31): token}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    elif place == "vocabulary":
        edit(tmp_path, lambda content: content["model"]["vocab"].update(Y=2**31))
    else:
        edit(tmp_path, lambda content: content["added_tokens"][0].update(id=2**31))
    with pytest.raises(UserError, match="the id 2147483648, more than a vocabulary has"):
        load_tokenizer(tmp_path)
