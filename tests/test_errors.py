"""Errors for users are one printable line of bounded length."""

from __future__ import annotations

import pickle

import pytest

from megalard.errors import RankError, UserError, printable, shown


@pytest.mark.parametrize("kind", [UserError, RankError])
def test_control_characters_are_escaped(kind):
    error = kind("a\x1b[31mred\nfile\u202e.txt")
    assert str(error) == "a\\x1b[31mred\\nfile\\u202e.txt"


def test_the_length_is_bounded():
    sentence = str(UserError("x" * 10**6))
    assert len(sentence) < 2100 and sentence.endswith(" ... (1000000 characters)")
    assert str(UserError("a sentence: with a fix")) == "a sentence: with a fix"


def test_letters_of_every_language_are_printed():
    assert str(UserError("données/книга.txt")) == "données/книга.txt"


def test_an_error_reaches_another_process_unchanged():
    """The ranks exchange errors as pickles."""
    error = pickle.loads(pickle.dumps(RankError("a\nb")))
    assert type(error) is RankError and str(error) == "a\\nb"


def test_printable_has_a_limit():
    assert printable("abc", 3) == "abc"
    assert printable("x" * 40, 30) == "xxxxxx ... (40 characters)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "'a'"),
        (1.5, "1.5"),
        (None, "None"),
        ([1, 2], "[1, 2]"),
        ("a\nb", "'a\\nb'"),
        (2**200, "a whole number of 201 bits"),
    ],
)
def test_values_are_shown_as_python_writes_them(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    "value", ["x" * 10**6, list(range(10**5)), {"a" * 500: "b" * 500}, 10**100, [["y"] * 99] * 99]
)
def test_long_values_are_shortened(value):
    assert len(shown(value)) <= 130
