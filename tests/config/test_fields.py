"""Fields: their ranges and choices, how values are checked, and where their help comes from."""

# ruff: noqa: RUF009 (fields of the configuration are declared by functions)

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import pytest

from megalard.config.fields import (
    Allowed,
    allowed_of,
    check_fields,
    default_of,
    help_texts,
    section,
    setting,
    without_none,
)
from tests.command_line import user_error


@dataclass(frozen=True)
class Inner:
    """An inner section."""

    share: float = setting(0.5, above=0, below=1)
    """A share."""


@dataclass(frozen=True)
class Example:
    """A section with a field of every kind."""

    count: int = setting(3, at_least=1, at_most=9)
    """How many, in two
    lines."""
    kind: Literal["a", "b"] = setting("a")
    """Which."""
    names: list[str] = setting(["x"], distinct=True)
    """Some names."""
    pair: list[float] = setting([0.0, 1.0], length=2)
    """Two numbers."""
    maybe: list[int] | None = setting(None, at_least=0)
    """Perhaps numbers."""
    files: list[str] = setting([], path=True, may_be_empty=True)
    """Some files."""
    needed: str = setting("given", required="give something")
    """Needed."""
    inner: Inner = section(Inner)


def test_the_defaults_are_allowed():
    check_fields(Example())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"count": 0}, "e.count must be at least 1; got 0"),
        ({"count": 10}, "e.count must be at most 9; got 10"),
        ({"kind": "c"}, "e.kind must be one of a, b; got 'c'"),
        ({"names": []}, "e.names must have one or more items; got []"),
        ({"names": ["x", "y", "x"]}, "e.names must not name an item twice; got ['x', 'y', 'x']"),
        ({"names": ["a\nb"]}, "e.names has a control character or a byte that is not UTF-8, "),
        ({"pair": [1.0]}, "e.pair must have 2 items; got [1.0]"),
        ({"pair": [1.0, 2.0, 3.0]}, "e.pair must have 2 items; got [1.0, 2.0, 3.0]"),
        ({"pair": [1.0, math.nan]}, "e.pair must be a finite number; got [1.0, nan]"),
        ({"maybe": [3, -1]}, "e.maybe must be at least 0; got [3, -1]"),
        ({"files": ["x" * 5000]}, "e.files is a path of 5000 characters, which no file system"),
        ({"files": ["a/" + "é" * 200]}, "e.files is a path of 202 characters, which no file"),
        ({"needed": ""}, "e.needed is not set: give something"),
        ({"inner": Inner(0.0)}, "e.inner.share must be greater than 0; got 0.0"),
        ({"inner": Inner(1.0)}, "e.inner.share must be less than 1; got 1.0"),
        ({"inner": Inner(math.inf)}, "e.inner.share must be a finite number; got inf"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(changes, sentence):
    assert user_error(check_fields, Example(**changes), "e.").startswith(sentence)


@pytest.mark.parametrize(
    "changes", [{"count": 9}, {"maybe": None}, {"maybe": [0]}, {"files": ["a/b"] * 2}]
)
def test_values_in_range_are_accepted(changes):
    check_fields(Example(**changes))


@pytest.mark.parametrize(
    ("allowed", "value", "problem"),
    [
        (Allowed(), 2**53, None),
        (Allowed(), 2**53 + 1, "at most 9007199254740992"),
        (Allowed(), -(2**53) - 1, "at most 9007199254740992"),
        (Allowed(), 1e31, "a finite number"),
        (Allowed(), 10**40, "a finite number"),
        (Allowed(at_least=0), 0, None),
        (Allowed(above=0), 0, "greater than 0"),
        (Allowed(below=1), 1.0, "less than 1"),
        (Allowed(at_most=1), 1.5, "at most 1"),
    ],
)
def test_numbers_have_bounds_that_json_and_fp32_keep(allowed, value, problem):
    assert allowed.problem(value) == problem


def test_ranges_are_described_in_words():
    assert Allowed(at_least=0, below=1).describe() == "at least 0 and less than 1"
    assert Allowed(above=1).describe() == "greater than 1"
    assert Allowed(at_most=5).describe() == "at most 5"
    assert Allowed().describe() == ""


def test_a_default_list_is_copied_for_every_instance():
    first, second = Example(), Example()
    assert first.names == second.names and first.names is not second.names


def test_the_string_after_a_field_is_its_help():
    texts = help_texts(Example)
    assert texts["count"] == "How many, in two lines." and texts["kind"] == "Which."
    assert "inner" not in texts


def test_facts_about_a_field_are_read_from_its_declaration():
    by_name = {field.name: field for field in fields(Example)}
    assert allowed_of(by_name["count"]) == Allowed(at_least=1, at_most=9)
    assert default_of(by_name["names"]) == ["x"] and default_of(by_name["inner"]) == Inner()


def test_a_hint_may_include_none():
    assert without_none(int | None) == (int, True)
    assert without_none(list[int]) == (list[int], False)


@dataclass(frozen=True)
class Named:
    """A section of named entries."""

    entries: dict[str, Inner]


@pytest.mark.parametrize("name", ["a-b", "A_1", "0", "x" * 64])
def test_names_of_entries_may_be_parts_of_file_names(name):
    check_fields(Named({name: Inner()}))


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "é", "x" * 65, "a b", "-"])
def test_other_names_are_refused(name):
    sentence = user_error(check_fields, Named({name: Inner()}))
    assert sentence.startswith("entries has the entry ")
    assert sentence.endswith(
        "a name may have letters, digits, - and _ only, and at most 64 of them"
    )
