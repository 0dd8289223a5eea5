"""Companions: which files are found, what is copied, and what a longer window changes in them."""

from __future__ import annotations

import json

import pytest

from megalard.checkpoint.companions import (
    Companion,
    find_companions,
    for_window,
    is_companion,
    tokenizer_companions,
)

CODE = {"eos_token": "</s>", "auto_map": {"AutoTokenizer": ["custom.Custom", None]}}


@pytest.fixture
def model(tmp_path):
    """A directory with tokenizer files in a folder, a generation file and files that stay."""
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in (
        "tokenizer.json",
        "tokenizer.model.v3",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "generation_config.json",
        "config.json",
        "model.safetensors",
        "custom.py",
        "README.md",
    ):
        (folder / name).write_text(f'{{"file": "{name}"}}')
    (folder / "tokenizer_config.json").write_text(json.dumps(CODE))
    return folder


TOKENIZER = {
    "tokenizer.json",
    "tokenizer.model.v3",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "tokenizer_config.json",
}


def contents(companions, folder) -> dict:
    """Write companions into a folder and return the JSON in each of them."""
    for companion in companions:
        companion.write(folder)
    files = (path for path in folder.rglob("*") if path.is_file())
    return {f.relative_to(folder).as_posix(): json.loads(f.read_text()) for f in files}


def test_the_files_of_the_tokenizer_are_found_and_copied(model, tmp_path):
    companions = tokenizer_companions(model)
    assert {companion.name for companion in companions} == TOKENIZER
    written = contents(companions, tmp_path / "out")
    assert written["additional_chat_templates/tools.jinja"] == {
        "file": "additional_chat_templates/tools.jinja"
    }
    # Code in the directory is neither run nor copied, so it is not named either.
    assert written["tokenizer_config.json"] == {"eos_token": "</s>"}
    names = {companion.name for companion in find_companions(model)}
    assert names == {*TOKENIZER, "generation_config.json"}


def test_an_unchanged_file_is_copied_byte_for_byte(tmp_path):
    source = tmp_path / "vocab.json"
    source.write_bytes(b'{"b":1,\r\n "a": "\\u00e9"}  ')
    (companion,) = tokenizer_companions(tmp_path)
    companion.write(tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tokenizer.json", True),
        ("generation_config.json", True),
        ("qwen.tiktoken", True),
        ("additional_chat_templates", True),
        ("config.json", False),
        ("model.safetensors", False),
        ("notes.txt", False),
    ],
)
def test_names_of_companions_are_recognized(name, expected):
    assert is_companion(name) == expected


NATIVE, WINDOW = 64, 256


def edited(tmp_path, name: str, content: dict) -> dict:
    """Return the content of a companion after it was adapted to the window of a student."""
    source = tmp_path / name
    source.write_text(json.dumps(content))
    (companion,) = for_window([Companion(name, source)], NATIVE, WINDOW)
    return contents([companion], tmp_path / "out")[name]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        # A longest text below the student's window is raised, and a larger one is kept.
        ("tokenizer_config.json", {"model_max_length": 64}, {"model_max_length": 256}),
        ("tokenizer_config.json", {"model_max_length": 100}, {"model_max_length": 256}),
        ("tokenizer_config.json", {"max_len": 64, "eos": 2}, {"max_len": 256, "eos": 2}),
        ("tokenizer_config.json", {"model_max_length": 1e30}, {"model_max_length": 1e30}),
        ("tokenizer_config.json", {"model_max_length": "64"}, {"model_max_length": "64"}),
        # The length of generation is raised only if it is the native window.
        ("generation_config.json", {"max_length": 64}, {"max_length": 256}),
        ("generation_config.json", {"max_length": 20}, {"max_length": 20}),
        ("generation_config.json", {"max_new_tokens": 64}, {"max_new_tokens": 64}),
        (
            "tokenizer.json",
            {"truncation": {"max_length": 64, "stride": 0}, "model": {}},
            {"truncation": {"max_length": 256, "stride": 0}, "model": {}},
        ),
        (
            "tokenizer.json",
            {"truncation": {"max_length": 512}},
            {"truncation": {"max_length": 512}},
        ),
        ("tokenizer.json", {"truncation": None}, {"truncation": None}),
        ("special_tokens_map.json", {"max_len": 64}, {"max_len": 64}),
    ],
)
def test_lengths_are_those_of_the_student(name, before, after, tmp_path):
    assert edited(tmp_path, name, before) == after


def test_two_edits_of_a_file_are_both_kept(model, tmp_path):
    config = {**CODE, "model_max_length": NATIVE}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    companions = for_window(tokenizer_companions(model), NATIVE, WINDOW)
    written = contents(companions, tmp_path / "out")
    assert written["tokenizer_config.json"] == {"eos_token": "</s>", "model_max_length": WINDOW}


def test_a_file_that_is_not_json_is_copied_as_it_is(tmp_path):
    source = tmp_path / "tokenizer_config.json"
    source.write_text("{ cut")
    (companion,) = for_window(tokenizer_companions(tmp_path), NATIVE, WINDOW)
    companion.write(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{ cut"
