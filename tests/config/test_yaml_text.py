"""YAML with limits: plain values, each key once, and no file that expands without bound."""

from __future__ import annotations

import json
import os
import time

import pytest

from megalard.config.yaml_text import parse_file, parse_value
from tests.command_line import user_error


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("model: [", "is not valid YAML: "),
        ("optimizer: {steps: 3}\noptimizer: {eps: 1}", "is not valid YAML: 'optimizer' is given"),
        ("optimizer: {steps: 3, steps: 4}", "is not valid YAML: 'steps' is given twice"),
        (b"\xff\xfe\x00", "is not valid YAML: "),
        ("? [a, b]\n: 3", "is not valid YAML: a key that is not a word"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine"),
        ("a: !!timestamp 2026-01-05", "is not valid YAML: could not determine"),
        ("a: *unknown", "is not valid YAML: found undefined alias"),
        ("a: 1\n--- \nb: 2", "is not valid YAML: expected a single document"),
        ("- a\n- b\n", "must hold sections such as 'model:' and 'data:'"),
        ("just text", "must hold sections such as 'model:' and 'data:'"),
    ],
)
def test_a_bad_file_is_refused(content, sentence, write):
    path = write(content)
    message = user_error(parse_file, path)
    assert message.startswith(f"{path} ") and sentence in message and message.isprintable()


def test_an_empty_file_has_no_sections(write):
    assert parse_file(write("")) == parse_file(write("# only a comment\n")) == {}


def test_a_missing_file_is_named(tmp_path):
    sentence = user_error(parse_file, str(tmp_path / "none.yaml"))
    path = tmp_path / "none.yaml"
    assert sentence == f"cannot read the config file {path}: No such file or directory"
    assert user_error(parse_file, str(tmp_path)) == (
        f"cannot read the config file {tmp_path}: Is a directory"
    )
    assert "is not a path" in user_error(parse_file, "a\0b")


def test_a_named_pipe_is_refused_at_once(tmp_path):
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    assert user_error(parse_file, str(pipe)) == (
        f"{pipe} is not a regular file: a regular file is needed there"
    )


def test_dates_and_binary_data_stay_text(write):
    path = write("a: 2026-01-05\nb: 2026-01-05T10:00:00Z\nc: 0x1F\nd: 1_000\n")
    assert parse_file(path) == {
        "a": "2026-01-05",
        "b": "2026-01-05T10:00:00Z",
        "c": 31,
        "d": 1000,
    }
    assert parse_value("2026-01-05") == "2026-01-05"


def test_a_file_that_is_nested_too_deep_is_refused(write):
    deep = "[" * 30 + "]" * 30
    assert parse_file(write(f"a: {deep}")) == {"a": json.loads(deep)}
    for depth in (40, 5000, 100_000):
        assert "is not valid YAML: " in user_error(parse_file, write("a: " + "[" * depth))
    deep = user_error(parse_file, write("a: " + "[" * 40 + "]" * 40))
    assert deep.endswith("it is nested more than 32 deep")


def test_a_file_that_is_too_large_is_refused(write):
    assert len(parse_file(write("a: [" + "1, " * 10_000 + "1]"))["a"]) == 10_001
    sentence = user_error(parse_file, write("a: [" + "1, " * 20_000 + "1]"))
    assert sentence.endswith("it has more than 20000 values")
    sentence = user_error(parse_file, write("# " + "x" * 2**20))
    assert sentence.endswith("has more than 1048576 bytes: give a smaller file")


def test_aliases_may_repeat_a_value_but_not_without_bound(write):
    path = write("a: &shared {steps: 3}\nb: *shared\nc: {<<: *shared, eps: 1}\n")
    assert parse_file(path) == {"a": {"steps": 3}, "b": {"steps": 3}, "c": {"steps": 3, "eps": 1}}
    # Nine lists of nine aliases each would be 9^9 values.
    lines = ["x0: &x0 [1, 2]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 10)]
    start = time.monotonic()
    assert user_error(parse_file, write("\n".join(lines))).endswith("it has more than 20000 values")
    assert time.monotonic() - start < 5
    # A value that contains itself.
    assert "is not valid YAML: " in user_error(parse_file, write("a: &a [*a]"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("2.5", 2.5),
        ("true", True),
        ("[a, 1]", ["a", 1]),
        ("{a: 1}", {"a": 1}),
        ("null", None),
        ("", None),
        ("~", None),
        # Not valid YAML, and therefore text.
        ("[a", "[a"),
        ("{a: 1, a: 2}", "{a: 1, a: 2}"),
        ("a: b: c", "a: b: c"),
        ("[" * 50 + "]" * 50, "[" * 50 + "]" * 50),
        ("0x", "0x"),
    ],
)
def test_an_override_is_a_yaml_value_or_text(text, value):
    assert parse_value(text) == value
