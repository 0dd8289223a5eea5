"""Mixtures: shares of characters, the end, and the identity."""

from __future__ import annotations

import pytest

from megalard.data.mixture import MixedText
from megalard.data.sources import Text


@pytest.fixture
def mix(tmp_path):
    """A function that mixes files of documents of one letter each."""

    def mix(weights: list[float], *counts_and_lengths: tuple[int, int]) -> MixedText:
        texts = []
        for number, (count, length) in enumerate(counts_and_lengths):
            letter = chr(ord("a") + number)
            file = tmp_path / f"{letter}.jsonl"
            lines = [f'{{"text": "{letter * length}"}}'] * count
            if not file.exists():
                file.write_text("\n".join(lines))
            texts.append(Text([file]))
        return MixedText(texts, weights)

    return mix


@pytest.mark.parametrize("weights", [[3, 1], [0.75, 0.25], [300.0, 100.0]])
def test_characters_have_the_shares_of_the_weights(weights, mix):
    documents = [*mix(weights, (90, 2), (1000, 5)).documents()]
    a, b = (sum(d.count(letter) for d in documents) for letter in "ab")
    assert a == 180 and abs(b - 60) <= 5
    # Everywhere, and not only in the end.
    half = documents[: len(documents) // 2]
    assert abs(sum(d.count("a") for d in half) - 3 * sum(d.count("b") for d in half)) <= 15


def test_it_ends_with_the_text_that_is_used_up_first(mix):
    documents = [*mix([1, 1, 1], (100, 1), (3, 1), (100, 1)).documents()]
    assert [documents.count(letter) for letter in "abc"] == [4, 3, 3]


def test_the_identity_has_the_texts_and_the_ratios(mix):
    counts = ((5, 1), (5, 1))
    one, same, other = (mix(w, *counts) for w in ([1, 2], [2, 4], [2, 1]))
    assert one.files == same.files != other.files
    assert one.content == same.content != other.content
    assert one.has_fingerprint(one.content, "moved") and not one.has_fingerprint("x", other.files)
    read = mix([1, 2], *counts)
    assert [*read.documents()] and read.content == one.content
