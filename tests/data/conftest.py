"""Token stores of documents of given lengths."""

from __future__ import annotations

import pytest

from tests.data.documents import store_of
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
        return store_of(texts, byte_tokenizer, tmp_path / name)

    return make
