import pytest
from data_helpers import make_byte_tokenizer

from megalard.data.token_store_writer import write_store


@pytest.fixture
def byte_tokenizer():
    return make_byte_tokenizer()


@pytest.fixture
def make_store(tmp_path, byte_tokenizer):
    """Builds a store of documents with the given numbers of tokens, their eos included."""

    def make(lengths, name="store"):
        texts = [chr(ord("a") + i % 26) * (length - 1) for i, length in enumerate(lengths)]
        return write_store(texts, byte_tokenizer, tmp_path / name, "fixture")

    return make
