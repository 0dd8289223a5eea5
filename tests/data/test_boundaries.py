"""The special tokens around each document."""

from __future__ import annotations

import pytest

from megalard.data.boundaries import Boundaries, boundaries_of
from tests.command_line import user_error
from tests.small_tokenizers import EOS, make_byte_tokenizer

BOS = 7


@pytest.fixture
def tokenizer():
    """A tokenizer that puts its BOS before a text and its end token after it."""
    return make_byte_tokenizer(starts_with=(BOS,), bos_id=BOS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [BOS, 97, EOS]),
        ({"bos": "no"}, [97, EOS]),
        ({"eos": "no"}, [BOS, 97]),
        ({"bos": "no", "eos": "no"}, [97]),
        ({"bos": "yes", "eos": "yes"}, [BOS, 97, EOS]),
        ({"eos": "yes", "end_token": "b"}, [BOS, 97, 98]),
    ],
)
def test_a_document_gets_the_chosen_tokens(options, expected, tokenizer):
    assert boundaries_of(tokenizer, **options).around([97]) == expected


def test_auto_puts_what_the_tokenizer_puts(tokenizer):
    plain = make_byte_tokenizer(bos_id=BOS)
    assert boundaries_of(plain) == Boundaries((), (EOS,))
    assert boundaries_of(plain, bos="yes") == Boundaries((BOS,), (EOS,))
    assert boundaries_of(tokenizer) == Boundaries((BOS,), (EOS,))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bos": "yes"}, "data.bos is yes, but the tokenizer in /byte-tokenizer has no BOS token"),
        ({"end_token": "b"}, "data.end_token b is given, so data.eos must be yes, not auto"),
        ({"eos": "yes", "end_token": "<none>"}, "/byte-tokenizer has no token '<none>'"),
    ],
)
def test_a_token_that_there_is_not_is_refused(options, sentence):
    assert sentence in user_error(boundaries_of, make_byte_tokenizer(), **options)
