"""Lengths on the command line: which spellings are read, and which are refused."""

from __future__ import annotations

import pytest

from megalard.config.lengths import parse_length
from tests.command_line import user_error


def test_lengths_are_tokens_or_thousands():
    assert [parse_length(text) for text in ("4096", "4K", "128k")] == [4096, 4096, 131072]


@pytest.mark.parametrize("text", ["", "K", "1", "0", "-4", "4.5", "4M", "1e3", "٣٢", "9" * 13])
def test_what_is_not_a_length_is_refused(text):
    assert "is not a length: write tokens, as 4096 or 4K" in user_error(parse_length, text)


def test_the_caller_chooses_the_least_length():
    assert parse_length("1", least=1) == 1
    assert "'1' is not a length" in user_error(parse_length, "1")
