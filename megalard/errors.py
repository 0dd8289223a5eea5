"""Exceptions that explain bad input to the user, and values made safe to print in them."""

from __future__ import annotations

import reprlib

_SENTENCE_LIMIT = 2000  # characters
_VALUE_LIMIT = 100  # characters


class UserError(Exception):
    """Bad input, explained in one sentence that names the value and the fix.

    Commands print the sentence on one rank, without a traceback, and exit with status 1. Control
    characters in the sentence are escaped and its length is bounded, because file names and file
    contents may become part of it.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence, _SENTENCE_LIMIT))


class RankError(UserError):
    """Bad input that may be visible to one rank only, such as a damaged file that one rank reads.

    The rank that raises it prints it, whatever its number. The launcher then ends the other ranks.
    """


class DiskError(UserError):
    """A disk or network file system that refused to read or write; another try may succeed."""


def printable(text: str, limit: int = _SENTENCE_LIMIT) -> str:
    """Return ``text`` on one line: control characters escaped, at most ``limit`` characters."""
    if len(text) > limit:
        text = f"{text[: limit - 24]} ... ({len(text)} characters)"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def reason_of(error: BaseException, limit: int = 200) -> str:
    """Return the message of another package's error on one line, or its type if it has none."""
    return printable(" ".join(str(error).split()), limit) or type(error).__name__


def shown(value: object) -> str:
    """Return a short representation of a value from a user's file, for use in an error message."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    return printable(_SHORT.repr(value), _VALUE_LIMIT)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _VALUE_LIMIT - 2
_SHORT.maxlong = 60
