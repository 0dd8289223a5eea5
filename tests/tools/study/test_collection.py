"""The corpus in memory: copies, splits, and independence from the number of processes."""

from __future__ import annotations

import numpy as np

from tools.study.collection import collect, join_paragraphs, without_copies
from tools.study.documents import SPLITS, Document
from tools.study.passages import passages_of

WORDS = [f"word{number}" for number in range(3000)]


def text_of(start: int, count: int) -> str:
    return " ".join(WORDS[start : start + count])


def document(split: str, source: str, text: str) -> Document:
    return Document("prose", split, source, text, *passages_of(text))


def test_copies_are_left_out_and_the_tests_come_first():
    documents = [
        document("train", "near the test", text_of(0, 300) + " " + text_of(2000, 700)),
        document("train", "new", text_of(1000, 400)),
        document("train", "near", text_of(1000, 300) + " " + text_of(1500, 100)),
        document("train", "half new", text_of(1250, 150) + " " + text_of(1600, 300)),
        document("train", "too short for a passage", "a word"),
        document("validation", "as in the test", text_of(0, 400)),
        document("test", "test", text_of(0, 400)),
    ]
    assert [d.source for d in without_copies(documents)] == ["test", "new", "half new"]
    assert without_copies([]) == []


def test_paragraphs_of_one_source_become_one_document():
    paragraphs = [document("train", "LICENSE", text_of(start, 60)) for start in (0, 100)]
    (joined, other) = join_paragraphs([*paragraphs, document("train", "b", text_of(200, 60))])
    assert joined.text == f"{paragraphs[0].text}\n\n{paragraphs[1].text}"
    assert len(joined.passages) == sum(len(p.passages) for p in paragraphs)
    assert other.source == "b"


def test_the_corpus_depends_on_files_and_options_alone(stdlib):
    """On one process or three; and no two splits share more than a tenth of a document."""
    one, three = (collect([stdlib], 400_000, workers) for workers in (1, 3))
    for domain, splits in one.items():
        for split, documents in splits.items():
            others = three[domain][split]
            assert [d.source for d in documents] == [d.source for d in others]
            assert [d.text for d in documents] == [d.text for d in others]
    by_split = {split: [d for splits in one.values() for d in splits[split]] for split in SPLITS}
    tested = np.concatenate([d.passages for d in by_split["test"]])
    for trained in by_split["train"]:
        shared = trained.weights[np.isin(trained.passages, tested)].sum() / trained.weights.sum()
        assert shared <= 0.1, trained.source
    sources = [{d.source for d in documents} for documents in by_split.values()]
    assert not sources[0] & sources[1] and not sources[0] & sources[2]
