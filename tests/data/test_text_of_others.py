"""Directories and files of text as data sets have them: read, counted, or refused."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from megalard.data.token_store import TokenStore
from tests.command_line import megalard, refusal
from tests.models import make_model
from tests.small_tokenizers import save_byte_tokenizer

LINES = "\n".join(json.dumps({"text": "real text " * 50}) for _ in range(50))
CARD = "# A data set\n" + "This card describes the data set. " * 80


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_model("llama", tmp_path_factory.mktemp("text") / "model", vocab_size=257)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def prepare(model, tmp_path):
    """The words of a command that prepares some text."""
    return lambda *paths: ("prepare", "--model", model, "--output", tmp_path / "store", *paths)


def test_a_card_next_to_packed_data_is_read_with_the_data(tmp_path, prepare):
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for number in range(3):
        with gzip.open(folder / f"data/part-{number}.jsonl.gz", "wt") as file:
            file.write(LINES)
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), folder / "data/train.parquet")
    assert megalard(*prepare(folder)) == 0
    assert len(TokenStore.open(tmp_path / "store").documents) - 1 == 1 + 3 * 50 + 2


def test_a_card_next_to_data_that_is_not_read_is_not_trained_on_alone(tmp_path, prepare, capsys):
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "data/train.csv.gz").write_bytes(gzip.compress(bytes(range(256)) * 99))
    (folder / "data/train.tar").write_bytes(b"\0" * 5000)
    line = refusal(capsys, *prepare(folder))
    assert ".tar" in line and ".csv.gz" in line
    assert not (tmp_path / "store").exists()


def test_a_card_next_to_lines_is_read_or_named(tmp_path, prepare, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "a.jsonl").write_text(LINES)
    assert megalard(*prepare(folder)) == 0
    assert len(TokenStore.open(tmp_path / "store").documents) - 1 == 51


@pytest.mark.parametrize("name", ["part-00000", "b.json"])
def test_files_of_other_names_are_not_passed_over_in_silence(name, tmp_path, prepare, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "NOTES.md").write_text("notes " * 50)
    (folder / name).write_text(LINES)
    line = refusal(capsys, *prepare(folder))
    assert str(folder) in line


def test_a_linked_folder_is_read(tmp_path, prepare):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "a.jsonl").write_text(LINES)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "README.md").write_text("card " * 300)
    (tmp_path / "corpus" / "shards").symlink_to(tmp_path / "big")
    assert megalard(*prepare(tmp_path / "corpus")) == 0
    assert len(TokenStore.open(tmp_path / "store").documents) - 1 == 51


def test_only_a_line_feed_ends_a_line(tmp_path, prepare):
    """Separators of Unicode within a text, a byte-order mark, and empty lines."""
    text = "a\u2028b\u2029c\x85d" * 20
    first = json.dumps({"text": text}, ensure_ascii=False).encode()
    second = json.dumps({"text": "plain " * 30}).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\r\n" + second + b"\n\n")
    assert megalard(*prepare(path)) == 0
    store = TokenStore.open(tmp_path / "store")
    lengths = (store.documents[1:] - store.documents[:-1]).tolist()
    assert lengths == [len(text.encode()), len("plain " * 30)]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("null.jsonl", '{"text": "ok ok ok"}\n{"text": null}\n', "null.jsonl"),
        ("chat.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n', "'text'"),
        ("list.json", '[{"text": "hi"}]', "list.json"),
    ],
)
def test_a_file_without_text_is_named(name, content, part, tmp_path, prepare, capsys):
    (tmp_path / name).write_text(content)
    assert part in refusal(capsys, *prepare(tmp_path / name))


def test_a_pattern_is_not_a_path(tmp_path, prepare, capsys):
    (tmp_path / "a.txt").write_text("text")
    assert "*.txt" in refusal(capsys, *prepare(tmp_path / "*.txt"))
