"""The study's corpus: what is text of which domain, what is a duplicate, and what is written."""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megalard.data.token_store import TokenStore
from megalard.data.tokenizer import load_tokenizer
from tests.tools.test_checkpoint_tools import tool
from tools.study import corpus_text
from tools.study.corpus_text import Document, pieces_of, without_duplicates

study_corpus = tool("study.corpus")
STDLIB = Path(sysconfig.get_paths()["stdlib"])
OPTIONS = ("--megabytes", 1, "--vocab", 600, "--native", 512, "--workers", 2)


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("train.py", "python"),
        ("cuda_fp16.hpp", "c"),
        ("kernel.cu", "c"),
        ("index.rst", "prose"),
        ("README", "prose"),
        ("README.Debian", "prose"),
        ("changelog.gz", "prose"),
        ("METADATA", "prose"),
        ("LICENSE.txt", "licences"),
        ("copyright", "licences"),
        ("COPYING.LIB", "licences"),
        ("license.py", "python"),
        ("requirements-dev.txt", None),
        ("top_level.txt", None),
        ("CMakeLists.txt", None),
        ("data.gz", None),
        ("image.png", None),
    ],
)
def test_a_file_s_name_says_its_domain(name, domain):
    assert corpus_text.domain_of(name) == domain


def test_code_loses_long_docstrings_and_they_become_prose():
    long = "Explains at length what this does.\n\n" + "    And why it does so.\n" * 20
    source = f'import os\n\n\ndef f(x):\n    """{long}    """\n    """kept"""\n    return x\n'
    short = '\n\ndef g():\n    """Short."""\n    return 1\n'
    code, prose = corpus_text.take_docstrings(source + short)
    assert "at length" not in code and "return x" in code and '"""Short."""' in code
    assert prose.startswith("Explains at length") and "\nAnd why it does so." in prose
    assert corpus_text.take_docstrings("def broken(:") == ("def broken(:", "")


def test_sources_lose_the_licence_they_begin_with():
    licence = "/* Copyright 2020\n * All rights reserved. */\n// more\n\n"
    assert corpus_text.without_header(licence + "int x;\n") == "int x;\n"
    assert corpus_text.without_header("# License: MIT\n#\nimport os\n") == "import os\n"
    kept = "/* What this header is for. */\nint x;\n"
    assert corpus_text.without_header(kept) == kept


def test_what_is_no_text_is_left_out(tmp_path):
    good = "A line of words that is read.\n" * 20
    for name, raw in {
        "good.txt": good.encode(),
        "good.txt.gz": gzip.compress(good.encode()),
        "short.txt": b"tiny\n",
        "binary.txt": bytes(range(256)) * 4,
        "table.txt": b"1.25 3.50 8.75\n" * 50,
        "minified.txt": b"word " * 500,
        "broken.txt.gz": b"\x1f\x8b" + bytes(300),
    }.items():
        (tmp_path / name).write_bytes(raw)
        found = corpus_text.read_text(tmp_path / name)
        assert found == (good if name.startswith("good") else None), name


WORDS = [f"word{number}" for number in range(3000)]


def text_of(first: int, count: int) -> str:
    return " ".join(WORDS[first : first + count])


def test_pieces_do_not_depend_on_how_lines_are_broken():
    text = text_of(0, 400)
    wrapped = text.upper().replace(" word1", "\n   word1")
    for ours, theirs in zip(pieces_of(text), pieces_of(wrapped), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # an inserted word changes the piece it is in, or cuts it
    changed = set(pieces_of(text.replace("word200 ", "word200 inserted "))[0].tolist())
    assert len(set(pieces_of(text)[0].tolist()) - changed) <= 2


def document(split: str, source: str, text: str) -> Document:
    return Document("prose", split, source, text, *pieces_of(text))


def test_duplicates_are_left_out_and_the_tests_come_first():
    documents = [
        document("train", "near the test", text_of(0, 300) + " " + text_of(2000, 700)),
        document("train", "new", text_of(1000, 400)),
        document("train", "near", text_of(1000, 300) + " " + text_of(1500, 100)),
        document("train", "half new", text_of(1250, 150) + " " + text_of(1600, 300)),
        document("train", "too short for a piece", "a word"),
        document("validation", "as in the test", text_of(0, 400)),
        document("test", "test", text_of(0, 400)),
    ]
    assert [d.source for d in without_duplicates(documents)] == ["test", "new", "half new"]
    assert without_duplicates([]) == []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Python and prose from the standard library."""
    output = tmp_path_factory.mktemp("corpus") / "out"
    assert study_corpus("--output", output, "--roots", STDLIB, *OPTIONS) == 0
    return output


def test_it_writes_a_tokenizer_and_stores(corpus):
    content = json.loads((corpus / "corpus.json").read_text())
    tokenizer = load_tokenizer(corpus / "tokenizer")
    assert tokenizer.vocab_size == 600 and tokenizer.fingerprint == content["tokenizer"]
    # every digit is a token
    assert len(tokenizer.encode_batch(["48213"])[0]) == 5
    domains = content["domains"]
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


def documents_of(store: TokenStore) -> list[bytes]:
    return [store.tokens[a:b].tobytes() for a, b in pairwise(store.documents)]


def test_mixed_is_every_train_document_in_another_order(corpus):
    domains = json.loads((corpus / "corpus.json").read_text())["domains"]
    parts = [name for name in domains if name != "mixed"]
    trains = {name: documents_of(TokenStore.open(corpus / name / "train")) for name in parts}
    mixed = documents_of(TokenStore.open(corpus / "mixed" / "train"))
    assert Counter(mixed) == Counter(row for rows in trains.values() for row in rows)
    origin = {row: name for name, rows in trains.items() for row in rows}
    # shuffled: of all kinds in each part of it
    for start in range(0, len(mixed), max(1, len(mixed) // 4))[:4]:
        part = {origin[row] for row in mixed[start : start + len(mixed) // 4]}
        assert part == set(parts)
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


def test_the_corpus_depends_on_files_and_options_alone():
    """On one worker or three; and no two splits share more than a tenth of a document."""

    def collected(workers: int):
        return corpus_text.collect([STDLIB], 400_000, workers)

    one, three = collected(1), collected(3)
    for domain, splits in one.items():
        for split, documents in splits.items():
            others = three[domain][split]
            assert [d.source for d in documents] == [d.source for d in others]
            assert [d.text for d in documents] == [d.text for d in others]
    by_split = {
        split: [d for splits in one.values() for d in splits[split]] for split in corpus_text.SPLITS
    }
    tested = np.concatenate([d.pieces for d in by_split["test"]])
    for found in by_split["train"]:
        shared = found.weights[np.isin(found.pieces, tested)].sum() / found.weights.sum()
        assert shared <= 0.1, found.source
    sources = [{d.source for d in documents} for documents in by_split.values()]
    assert not sources[0] & sources[1] and not sources[0] & sources[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--roots", "/nowhere"), "--roots has /nowhere, which is no folder"),
        (("--vocab", "100"), "--vocab is 100: give 257 to 65536 pieces"),
        (("--synthetic", "1"), "--synthetic is 1.0: give a share"),
        (("--megabytes", "0"), "--megabytes is 0.0: give more than 0"),
        (("--roots", "EMPTY"), "hold enough text of 0 domains"),
    ],
)
def test_bad_input_is_told_in_one_sentence(arguments, sentence, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = [tmp_path / "empty" if word == "EMPTY" else word for word in arguments]
    assert study_corpus("--output", tmp_path / "out", *words) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("megalard: error: ")
    assert sentence in errors[0] and not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert study_corpus("--output", tmp_path, *OPTIONS) == 1
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
