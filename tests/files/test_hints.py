"""Sentences about things that are not read name what they are and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalard.data.sources import list_files
from megalard.model.spec import read_spec
from tests.command_line import user_error


def test_a_name_on_the_hub_is_recognized():
    sentence = user_error(read_spec, "meta-llama/Llama-3.1-8B")
    assert sentence == (
        "no model directory at meta-llama/Llama-3.1-8B: if that is a name on the Hugging Face Hub, "
        "download it with hf download meta-llama/Llama-3.1-8B --local-dir DIR, and give DIR"
    )
    assert "a dataset on the Hugging Face Hub is tokenized by megalard prepare" in user_error(
        list_files, ["allenai/c4"]
    )


@pytest.mark.parametrize("path", ["/nowhere/model", "nowhere", "a/b/c", "tests/nowhere", "~/m/x"])
def test_other_paths_are_not_taken_for_names_on_the_hub(path):
    assert user_error(read_spec, path).endswith("give a Hugging Face model directory")


def test_gguf_files_are_recognized(tmp_path):
    file = tmp_path / "m.Q8_0.gguf"
    file.write_bytes(b"GGUF")
    command = f"python -m tools.convert_gguf {file} DIR"
    assert command in user_error(read_spec, file)
    assert command in user_error(read_spec, tmp_path)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("t.csv", "write it as .jsonl"),
        ("t.json", "write it as .jsonl"),
        ("t.jsonl.xz", "unpack it first"),
        ("t.bin", "or a directory of them"),
    ],
)
def test_formats_of_text_that_are_not_read_have_a_fix(name, fix, tmp_path):
    Path(tmp_path, name).write_bytes(b"x")
    assert user_error(list_files, [tmp_path / name]).rstrip().find(fix) > 0
    if fix == "or a directory of them":
        assert user_error(list_files, [tmp_path / name]).endswith(fix)
