"""Data sets of the Hugging Face hub: which rows and column are read, and what is noted of them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from megalard.data.formats import Column, text_column
from megalard.data.hub import HubText
from megalard.data.token_store import META, TokenStore
from megalard.data.token_store_writer import open_or_write
from megalard.errors import UserError

ROWS = [{"text": "one", "id": 1}, {"text": "  ", "id": 2}, {"text": "two", "id": 3}]


def _dtype(value: object) -> str:
    return "string" if isinstance(value, str) else "int64"


class Rows(list):
    """Rows with the types of their columns."""

    @property
    def features(self):
        return {
            key: [] if isinstance(value, list) else SimpleNamespace(dtype=_dtype(value))
            for key, value in self[0].items()
        }


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set, that notes how it is asked for."""
    hub = SimpleNamespace(rows=Rows(ROWS), commit="abc", asked=[], error=None)

    def load_dataset(name, subset, **options):
        if hub.error:
            raise hub.error
        hub.asked.append((name, subset, options))
        return hub.rows

    class Api:
        def dataset_info(self, name, revision):
            return SimpleNamespace(sha=revision or hub.commit)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return hub


def test_rows_are_streamed_from_the_commit(hub):
    text = HubText("owner/name", text_column("text"), "subset", "test")
    assert [*text.documents()] == ["one", "two"]
    options = {"split": "test", "revision": "abc", "streaming": True}
    assert hub.asked == [("owner/name", "subset", options)]
    assert HubText("owner/name", text_column("text"), revision="v1").origin["revision"] == "v1"


def test_the_identity_is_the_commit_the_split_and_the_column(hub):
    def identity(key="text", **options):
        return HubText("owner/name", text_column(key), **options).files

    others = [
        identity(split="test"),
        identity(subset="x"),
        identity(revision="def"),
        identity("id"),
    ]
    assert identity() == identity() and identity() not in others
    assert len(set(others)) == 4


def test_a_single_column_of_text_is_found(hub):
    hub.rows = Rows({"content": row["text"], "id": row["id"]} for row in ROWS)
    assert HubText("owner/name", text_column("text")).column.key == "content"
    hub.rows = Rows({"a": "x", "b": "y"} for _ in ROWS)
    with pytest.raises(
        UserError, match=r"owner/name has no column 'text' \(its columns: 'a', 'b'\)"
    ):
        HubText("owner/name", text_column("text"))


def test_a_single_column_of_chats_is_found(hub):
    hub.rows = Rows({"turns": [{"role": "user"}], "source": "web"} for _ in ROWS)
    chat = Column("messages", lambda value, where: str(len(value)), "template")
    text = HubText("owner/name", chat)
    assert text.column.key == "turns" and [*text.documents()] == ["1"] * 3


def test_the_store_notes_the_commit_and_a_change_is_reported(hub, byte_tokenizer, tmp_path):
    def write():
        text = HubText("owner/name", text_column("text"))
        return open_or_write(text, byte_tokenizer, tmp_path / "store")

    store = write()
    assert store.origin == json.loads((tmp_path / "store" / META).read_text())["origin"]
    assert store.origin["revision"] == "abc" and store.origin["dataset"] == "owner/name"
    assert write().tokens.tolist() == store.tokens.tolist()
    hub.commit, hub.rows = "def", Rows([{"text": "other"}])
    with pytest.raises(
        UserError, match="from the revision abc of the data set owner/name, which is"
    ):
        write()
    assert TokenStore.open(tmp_path / "store").tokens.tolist() == store.tokens.tolist()


def test_bad_data_sets_are_one_sentence(hub, monkeypatch):
    hub.error = ValueError("Unknown split 'tset'.\nShould be one of ['train'].")
    with pytest.raises(UserError, match=r"cannot be read \(Unknown split 'tset'\. Should be"):
        HubText("owner/name", text_column("text"), split="tset")
    hub.error = None
    hub.rows = Rows([{"text": " "}])
    with pytest.raises(UserError, match="there is no text in the data set owner/name"):
        [*HubText("owner/name", text_column("text")).documents()]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets: .*megalard\[datasets\]"):
        HubText("owner/name", text_column("text"))


def test_another_column_is_no_change_of_the_data_set(hub, byte_tokenizer, tmp_path):
    hub.rows = Rows({"a": "x", "b": "yy"} for _ in ROWS)
    for key, sentence in (("a", None), ("b", "was made from other text")):
        text = HubText("owner/name", text_column(key))
        if sentence is None:
            open_or_write(text, byte_tokenizer, tmp_path / "store")
            continue
        with pytest.raises(UserError, match=sentence):
            open_or_write(text, byte_tokenizer, tmp_path / "store")


def test_a_directory_whose_files_changed_is_another_text(hub, tmp_path):
    (tmp_path / "a.jsonl").write_text("x")
    identity = HubText(str(tmp_path), text_column("text")).files
    assert identity == HubText(str(tmp_path), text_column("text")).files
    (tmp_path / "a.jsonl").write_text("other")
    assert identity != HubText(str(tmp_path), text_column("text")).files


def test_large_strings_are_text_and_numbers_are_no_chat(hub):
    kinds = {"id": "string", "content": "large_string", "label": "int64"}
    features = {key: SimpleNamespace(dtype=kind) for key, kind in kinds.items()}
    hub.rows = type("Rows", (list,), {"features": features})([{"id": "1", "content": "x"}])
    with pytest.raises(UserError, match="has no column 'text'"):
        HubText("owner/name", text_column("text"))
    chat = Column("messages", lambda value, where: str(value), "template")
    with pytest.raises(UserError, match="has no column 'messages'"):
        HubText("owner/name", chat)


def test_the_package_reads_a_local_data_set(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    text = HubText(str(folder), text_column("text"))
    assert [*text.documents()] == ["one", "two"] and text.origin["revision"] is None


def test_only_another_revision_of_the_same_data_set_is_reported_as_a_difference(hub):
    text = HubText("owner/name", text_column("text"))
    origin = dict(text.origin)
    assert "from the revision old of the data set owner/name, which is now at abc" in (
        text.difference({**origin, "revision": "old"})
    )
    for recorded in (None, origin, {**origin, "dataset": "owner/other", "revision": "old"}):
        assert text.difference(recorded) is None
