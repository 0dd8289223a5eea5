"""``megalard prepare`` writes a token store, uses it again, and refuses another text."""

from __future__ import annotations

import json

import pytest

from megalard.data.token_store import TokenStore
from tests.command_line import megalard, refusal
from tests.jobs import snapshot
from tests.small_tokenizers import save_fast_tokenizer


@pytest.fixture
def model(tmp_path):
    """A directory with a tokenizer that puts ``<s>`` before a text."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return save_fast_tokenizer(tmp_path / "model", **settings, **tokens)


def words(tmp_path, model, *more: object) -> list[object]:
    """Return the words of a command that prepares ``text.txt``."""
    return ["prepare", "--model", model, "--output", tmp_path / "store", *more]


def test_a_store_is_written_used_again_and_kept_from_other_text(tmp_path, model, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox")
    assert megalard(*words(tmp_path, model, text)) == 0
    printed = capsys.readouterr().out
    store = TokenStore.open(tmp_path / "store")
    assert printed.startswith(f"{tmp_path / 'store'}: {len(store.tokens)} tokens in 1 documents, ")
    before = snapshot(tmp_path / "store")
    assert megalard(*words(tmp_path, model, text)) == 0
    text.write_text("other text")
    line = refusal(capsys, *words(tmp_path, model, text))
    assert line.startswith("megalard: error: token store")
    assert snapshot(tmp_path / "store") == before


@pytest.mark.parametrize(
    ("options", "start", "end"),
    [
        ((), [0], []),
        (("--bos", "no"), [], []),
        (("--eos", "yes"), [0], [1]),
        (("--bos", "no", "--eos", "yes", "--end-token", "<s>"), [], [0]),
    ],
)
def test_special_tokens_are_put_as_asked(options, start, end, tmp_path, model):
    (tmp_path / "text.txt").write_text("the fox")
    assert megalard(*words(tmp_path, model, *options, tmp_path / "text.txt")) == 0
    tokens = TokenStore.open(tmp_path / "store").tokens.tolist()
    assert tokens[: len(start)] == start and tokens[len(tokens) - len(end) :] == end
    assert not {0, 1} & set(tokens[len(start) : len(tokens) - len(end)])


def test_the_key_of_the_text_can_be_given(tmp_path, model, capsys):
    (tmp_path / "x.jsonl").write_text(json.dumps({"content": "the fox", "text": 3}) + "\n")
    assert megalard(*words(tmp_path, model, "--text-key", "content", tmp_path / "x.jsonl")) == 0
    assert "1 documents" in capsys.readouterr().out


def test_bad_input_is_refused_in_one_sentence(tmp_path, model, capsys):
    for more, sentence in (
        ((tmp_path / "no.txt",), "data path"),
        (("--end-token", "<s>", model), "must be yes, not auto"),
    ):
        assert sentence in refusal(capsys, *words(tmp_path, model, *more))
        assert not (tmp_path / "store").exists()
    assert "does not exist" in refusal(capsys, *words(tmp_path, "/nowhere", model))


def test_files_that_are_passed_over_are_warned_about(tmp_path, model, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("the fox")
    (folder / "picture.bin").write_text("x")
    assert megalard(*words(tmp_path, model, folder)) == 0
    warning = f"warning: 1 files of 1 bytes (.bin), such as {folder / 'picture.bin'} are not text"
    assert warning in capsys.readouterr().out
