"""Tokenizer files as public models have them: the ids and the end token of transformers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megalard.data.tokenizer import load_tokenizer
from tests.command_line import user_error
from tests.models import change_config, make_model
from tests.small_tokenizers import save_byte_tokenizer
from tools.campaigns.drawn_tokenizers import train_sentencepiece

TEXTS = [
    "the quick fox",
    "  two  spaces",
    "\n\nlines\n",
    "say </s> and <s> literally",
    "<|im_start|>user\nfox<|im_end|>\n",
    "é and 漢字",
    " lead",
    "tab\tq",
]
ADDED = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def assert_same_tokenizer(folder: Path) -> None:
    """Compare ids, number of ids and end token with those of transformers."""
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert ours.encode_batch(TEXTS) == expected
    assert ours.vocab_size == len(theirs) and ours.eos_id == theirs.eos_token_id
    around = theirs("the")["input_ids"]
    inner = theirs("the", add_special_tokens=False)["input_ids"]
    assert [*ours.starts_with, *inner, *ours.ends_with] == around


@pytest.mark.parametrize("decoder", [True, False], ids=["both files", "added_tokens.json alone"])
def test_tokens_added_to_a_sentencepiece_model(decoder, tmp_path):
    """A chat model of Llama 2's time: two tokens more, one of which is the end token."""
    size = train_sentencepiece(tmp_path)
    extra = {"<|im_start|>": size, "<|im_end|>": size + 1}
    write_json(tmp_path / "added_tokens.json", extra)
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    write_json(tmp_path / "special_tokens_map.json", special)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **special}
    config |= {"add_bos_token": True, "add_eos_token": False}
    if decoder:
        tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, **extra}
        config["added_tokens_decoder"] = {
            str(i): {"content": token, "special": True, **ADDED} for token, i in tokens.items()
        }
    write_json(tmp_path / "tokenizer_config.json", config)
    write_json(tmp_path / "config.json", {"model_type": "llama", "eos_token_id": size + 1})
    assert_same_tokenizer(tmp_path)
    # As transformers writes it again: one file for all.
    fast = tmp_path / "fast"
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(fast)
    write_json(fast / "config.json", {"model_type": "llama"})
    assert_same_tokenizer(fast)
    assert load_tokenizer(fast).encode_batch(TEXTS) == load_tokenizer(tmp_path).encode_batch(TEXTS)


@pytest.fixture
def model(tmp_path) -> Path:
    folder = make_model("llama", tmp_path / "model", vocab_size=257)
    save_byte_tokenizer(folder)
    return folder


def settings(**entries: object) -> Callable[[Path], None]:
    return lambda model: write_json(model / "tokenizer_config.json", entries)


def end_in_map(model: Path) -> None:
    write_json(model / "tokenizer_config.json", {})
    write_json(model / "special_tokens_map.json", {"eos_token": {"content": "</s>", **ADDED}})


def vocabulary_and_merges(model: Path) -> None:
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    (model / "tokenizer.json").unlink()
    write_json(model / "vocab.json", vocabulary)
    (model / "merges.txt").write_text("#version: 0.2\n")
    write_json(
        model / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"}
    )


@pytest.mark.parametrize(
    "change",
    [
        settings(eos_token={"__type": "AddedToken", "content": "</s>", **ADDED}),
        end_in_map,
        vocabulary_and_merges,
        settings(eos_token="</s>", tokenizer_class="LlamaTokenizer", legacy=False),
        settings(eos_token="<|im_end|>"),
        settings(eos_token="</s>", tokenizer_class="CustomTokenizer", auto_map={}),
    ],
    ids=[
        "end token as an object",
        "in special_tokens_map",
        "vocab and merges",
        "a class of Llama",
        "an end token that is added",
        "a class of its own",
    ],
)
def test_a_tokenizer_is_read_as_transformers_reads_it(change, model):
    change(model)
    assert_same_tokenizer(model)


def tiktoken(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    lines = (f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256))
    (model / "tokenizer.model").write_text("\n".join(lines))


@pytest.mark.skipif(find_spec("tiktoken") is not None, reason="tiktoken is installed")
def test_the_file_of_tiktoken_is_refused(model):
    """transformers reads it with a package that we do not ask for."""
    tiktoken(model)
    assert "cannot be loaded by transformers" in user_error(load_tokenizer, model)
    assert "add tokenizer.json" in user_error(load_tokenizer, model)


def test_an_end_token_that_nothing_names_is_asked_for(model):
    settings()(model)
    change_config(model, eos_token_id=None)
    (model / "generation_config.json").unlink(missing_ok=True)
    assert "has no end token" in user_error(load_tokenizer, model)
