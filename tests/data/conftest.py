"""Token stores of documents of given lengths."""

from __future__ import annotations

import pytest

from megalard.data.token_store_writer import write_store
from tests.small_tokenizers import make_byte_tokenizer


@pytest.fixture
def byte_tokenizer():
    """A tokenizer with one id per byte."""
    return make_byte_tokenizer()


@pytest.fixture
def make_store(tmp_path, byte_tokenizer):
    """A function that builds a store of documents with given numbers of tokens, with their eos."""

    def make(lengths, name="store"):
        texts = [chr(ord("a") + i % 26) * (length - 1) for i, length in enumerate(lengths)]
        return write_store(texts, byte_tokenizer, tmp_path / name, "fixture")

    return make
