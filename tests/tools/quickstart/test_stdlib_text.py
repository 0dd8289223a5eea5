"""The text of the quickstart: three splits that share nothing, the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import one_error, tool
from tools.quickstart import stdlib_text

write_text = tool("quickstart.stdlib_text")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The documents of each split, as the files have them."""
    folder = tmp_path_factory.mktemp("text") / "stdlib"
    assert write_text("--output", folder) == 0
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("train", "validation", "heldout")
    }


def test_the_splits_share_no_text_and_no_source(records):
    documents = [record for split in records.values() for record in split]
    assert len({record["text"] for record in documents}) == len(documents)
    assert len({record["source"] for record in documents}) == len(documents)


def test_the_splits_have_the_promised_sizes(records):
    sizes = {name: len(split) for name, split in records.items()}
    total = sum(sizes.values())
    assert total > 300
    assert sizes["heldout"] / total == pytest.approx(0.08, abs=0.04)
    assert sizes["validation"] / total == pytest.approx(0.04, abs=0.03)


def test_tests_tables_and_packages_of_others_are_left_out(records):
    sources = [record["source"] for split in records.values() for record in split]
    assert "statistics.py" in sources and "json/decoder.py" in sources
    assert not any({"test", "tests", "encodings"} & set(Path(s).parts) for s in sources)
    assert not any("site-packages" in s or "_sysconfigdata" in s for s in sources)


def test_the_split_of_a_file_never_changes():
    """Literals: the held-out text of one machine must not be trained on by another."""
    assert stdlib_text.split_of("argparse.py") == "train"
    assert stdlib_text.split_of("statistics.py") == "heldout"
    assert stdlib_text.split_of("logging/__init__.py") == "validation"


def test_empty_repeated_and_undecodable_files_are_left_out(tmp_path):
    for number in range(200):
        (tmp_path / f"file{number}.py").write_text(f"x = {number}\r\n", newline="")
    (tmp_path / "again.py").write_bytes(b"x = 7\r\n")
    (tmp_path / "blank.py").write_text(" \n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    splits = stdlib_text.collect_splits(tmp_path)
    texts = sorted(document["text"] for split in splits.values() for document in split)
    assert texts == sorted(f"x = {number}\n" for number in range(200))


def test_bad_input_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    assert write_text("--output", tmp_path / "file" / "text") == 1
    assert str(tmp_path / "file") in one_error(capsys.readouterr().err)
    monkeypatch.setattr(stdlib_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert write_text("--output", tmp_path / "text") == 1
    assert "has too few .py files" in one_error(capsys.readouterr().err)
    assert not (tmp_path / "text").exists()
