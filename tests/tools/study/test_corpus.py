"""The corpus on the disk: tokenizer, token stores, and bad input."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megalard.data.boundaries import boundaries_of
from megalard.data.token_store import TokenStore
from megalard.data.tokenizer import load_tokenizer
from tests.command_line import one_error, tool

study_corpus = tool("study.corpus")


def content(corpus) -> dict:
    return json.loads((corpus / "corpus.json").read_text())


def documents_of(store: TokenStore) -> list[bytes]:
    return [store.tokens[a:b].tobytes() for a, b in pairwise(store.documents)]


def test_it_writes_a_tokenizer_and_stores(corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    assert tokenizer.vocab_size == 600
    assert tokenizer.fingerprint == content(corpus)["tokenizer"]
    assert len(tokenizer.encode_batch(["48213"])[0]) == 5, "every digit is a token"
    domains = content(corpus)["domains"]
    assert {"python", "prose", "synthetic", "mixed"} <= set(domains)
    for domain, splits in domains.items():
        for split, entry in splits.items():
            store = TokenStore.open(corpus / domain / split)
            store.check_tokenizer(tokenizer)
            assert len(store.tokens) == entry["tokens"] > 0
            assert len(store.documents) - 1 == entry["documents"]
    assert 0.9e6 * 0.88 < domains["python"]["train"]["bytes"] < 1.3e6
    text = tokenizer.decode(TokenStore.open(corpus / "prose" / "test").read(0, 400).tolist())
    assert sum(letter.isalpha() or letter.isspace() for letter in text) > 0.7 * len(text)


def test_every_document_ends_with_the_end_token(corpus):
    """This is what the recipes of the study ask for."""
    tokenizer = load_tokenizer(corpus / "tokenizer")
    boundaries = boundaries_of(tokenizer, eos="yes")
    for domain, splits in content(corpus)["domains"].items():
        for split in splits:
            store = TokenStore.open(corpus / domain / split)
            store.check_boundaries(boundaries)
            is_end = store.tokens == tokenizer.eos_id
            assert is_end[store.documents[1:] - 1].all()
            if domain not in ("synthetic", "mixed"):  # whose fillers run over several documents
                assert is_end.sum() == len(store.documents) - 1, "it is not put twice"


def test_mixed_is_every_train_document_in_another_order(corpus):
    domains = content(corpus)["domains"]
    names = [name for name in domains if name != "mixed"]
    trains = {name: documents_of(TokenStore.open(corpus / name / "train")) for name in names}
    mixed = documents_of(TokenStore.open(corpus / "mixed" / "train"))
    assert Counter(mixed) == Counter(row for rows in trains.values() for row in rows)
    origin = {row: name for name, rows in trains.items() for row in rows}
    # Shuffled: each quarter has documents of every domain.
    for start in range(0, len(mixed), max(1, len(mixed) // 4))[:4]:
        assert {origin[row] for row in mixed[start : start + len(mixed) // 4]} == set(names)
    share = domains["synthetic"]["train"]["tokens"] / domains["mixed"]["train"]["tokens"]
    assert share == pytest.approx(0.15, abs=0.01)


def test_synthetic_documents_are_of_the_tasks_and_fit_the_window(corpus):
    store = TokenStore.open(corpus / "synthetic" / "train")
    tokenizer = load_tokenizer(corpus / "tokenizer")
    lengths = np.diff(store.documents) - 1
    assert lengths.max() <= 512 and lengths.min() < 300
    texts = [
        tokenizer.decode(store.tokens[a:b].tolist()) for a, b in pairwise(store.documents[:41])
    ]
    for words in ("pass key", "magic number", "VAR "):
        assert any(words in text for text in texts)
    other = TokenStore.open(corpus / "synthetic" / "test")
    assert not set(documents_of(other)) & set(documents_of(store))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--roots", "/nowhere"), "argument --roots: /nowhere is not a directory"),
        (("--vocab-size", "100"), "100 ids are not possible: give 257 to 65536"),
        (("--synthetic", "1"), "argument --synthetic: 1 is not a share"),
        (("--megabytes", "0"), "0 is too small: give more than 0"),
        (("--native-window", "127"), "127 is too small: give 128 or more"),
    ],
)
def test_values_out_of_range_are_refused(arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        study_corpus("--output", tmp_path / "out", *arguments)
    assert end.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    roots = ("--roots", tmp_path / "empty", "--workers", 1)
    assert study_corpus("--output", tmp_path / "out", *roots) == 1
    error = one_error(capsys.readouterr().err)
    assert "have enough text of 0 domains, and a study needs two" in error
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert study_corpus("--output", tmp_path, "--workers", 1) == 1
    assert f"{tmp_path} is not empty" in one_error(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
