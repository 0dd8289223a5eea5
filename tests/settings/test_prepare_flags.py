"""prepare: the effect of every flag."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalard.data.token_store import TokenStore
from tests.command_line import megalard, refusal
from tests.settings.tiny_run import make_tiny_job


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A directory with a model, ``teacher``, and text."""
    return make_tiny_job(tmp_path_factory.mktemp("prepare"))


@pytest.fixture
def prepare(job, tmp_path):
    """A function that prepares two documents with some more words, and returns their store."""
    lines = [{"text": "one", "body": "three"}, {"text": "two", "body": "seventeen"}]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def run(*words: object, model: Path = job / "teacher") -> TokenStore:
        output = tmp_path / f"store-{len(list(tmp_path.glob('store-*')))}"
        given = ("--model", model, "--output", output)
        assert megalard("prepare", *given, *words, tmp_path / "text.jsonl") == 0
        return TokenStore.open(output)

    return run


def lengths(store: TokenStore) -> list[int]:
    return (store.documents[1:] - store.documents[:-1]).tolist()


def test_prepare_model(prepare, job, tmp_path):
    content = json.loads((job / "teacher" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {k: 255 - i if i < 256 else i for k, i in vocabulary.items()}
    (tmp_path / "turned").mkdir()
    (tmp_path / "turned" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "turned" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    turned = prepare(model=tmp_path / "turned").tokens
    assert turned.tolist() == [255 - i for i in prepare().tokens.tolist()]


def test_prepare_output(prepare, tmp_path):
    assert prepare().path == tmp_path / "store-0"


def test_prepare_weights(job, tmp_path, capsys):
    """The other text gets four times as many characters, until the first is used up."""
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    (tmp_path / "other.jsonl").write_text("\n".join(['{"text": "four"}'] * 9))
    paths = (tmp_path / "one.jsonl", tmp_path / "other.jsonl")
    words = ("--model", job / "teacher", "--output", tmp_path / "store")
    assert megalard("prepare", *words, *paths, "--weights", "1", "4") == 0
    assert lengths(TokenStore.open(tmp_path / "store")) == [3, 4, 4, 4, 3, 4, 4, 4]
    for weights in (("1",), ("1", "0"), ("1", "nan"), ("1", "inf")):
        message = refusal(capsys, "prepare", *words, *paths, "--weights", *weights)
        assert "--weights needs one number above 0 for each path" in message


def test_prepare_text_key(prepare):
    assert lengths(prepare()) == [3, 3] and lengths(prepare("--text-key", "body")) == [5, 9]


def test_prepare_format(job, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(job / "teacher" / "tokenizer.json", tmp_path / "model")
    template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    settings = {"eos_token": "</s>", "chat_template": template}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    words = ("--model", tmp_path / "model", "--output", tmp_path / "store", "--format", "chat")
    assert megalard("prepare", *words, chat) == 0
    assert lengths(TokenStore.open(tmp_path / "store")) == [len("user=hi;")]


def test_prepare_eos(prepare):
    assert prepare("--eos", "yes").tokens[[3, 7]].tolist() == [256, 256]
    assert lengths(prepare("--eos", "no")) == [3, 3]


def id_of(letter: str, job: Path) -> int:
    """Return the id of a letter in the file of the tokenizer."""
    content = json.loads((job / "teacher" / "tokenizer.json").read_text())
    return content["model"]["vocab"][letter]


def test_prepare_end_token(prepare, job):
    store = prepare("--eos", "yes", "--end-token", "!")
    assert lengths(store) == [4, 4] and store.tokens[[3, 7]].tolist() == [id_of("!", job)] * 2


def test_prepare_bos(prepare, job, tmp_path):
    (tmp_path / "bos").mkdir()
    shutil.copy(job / "teacher" / "tokenizer.json", tmp_path / "bos")
    names = {"eos_token": "</s>", "bos_token": "A", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "bos" / "tokenizer_config.json").write_text(json.dumps(names))
    put, none = (prepare("--bos", c, model=tmp_path / "bos") for c in ("yes", "no"))
    assert lengths(put) == [4, 4] and lengths(none) == [3, 3]
    assert put.tokens[[0, 4]].tolist() == [id_of("A", job)] * 2
    assert put.tokens[1:4].tolist() == none.tokens[:3].tolist()


@pytest.fixture
def dataset(job, tmp_path, monkeypatch):
    """A function that prepares a data set with some words, and returns how it was opened."""
    asked = []

    class HubDataset(list):
        features = None

    def load_dataset(*names, **options):
        asked.append((names, options))
        return HubDataset([{"text": "one"}])

    class Api:
        def dataset_info(self, name, revision):
            return SimpleNamespace(sha=revision or "newest")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("huggingface_hub.HfApi", Api)

    def run(*words: str) -> tuple[tuple, dict]:
        given = ("--model", job / "teacher", "--output", tmp_path / f"store-{len(asked)}")
        assert megalard("prepare", *given, "--dataset", "owner/name", *words) == 0
        return asked[-1]

    return run


def test_prepare_dataset(dataset, tmp_path):
    assert dataset()[0] == ("owner/name", None)
    assert lengths(TokenStore.open(tmp_path / "store-0")) == [3]


def test_prepare_subset(dataset):
    assert dataset("--subset", "small")[0] == ("owner/name", "small")


def test_prepare_split(dataset):
    assert dataset("--split", "test")[1]["split"] == "test" and dataset()[1]["split"] == "train"


def test_prepare_revision(dataset):
    revisions = dataset("--revision", "v1")[1]["revision"], dataset()[1]["revision"]
    assert revisions == ("v1", "newest")


def test_prepare_takes_files_or_a_data_set(job, tmp_path, capsys):
    words = ("--model", job / "teacher", "--output", tmp_path / "store")
    for paths in ((), ("--dataset", "owner/name", job / "text.txt")):
        assert "give either text files or" in refusal(capsys, "prepare", *words, *paths)
    for flag in ("--subset", "--split", "--revision"):
        message = refusal(capsys, "prepare", *words, job / "text.txt", flag, "x")
        assert "--subset, --split and --revision need --dataset" in message
