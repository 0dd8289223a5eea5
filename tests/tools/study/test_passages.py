"""Passages are the same wherever the same words stand."""

from __future__ import annotations

import numpy as np

from tools.study.passages import passages_of

WORDS = " ".join(f"word{number}" for number in range(400))


def test_passages_do_not_depend_on_how_lines_are_broken():
    wrapped = WORDS.upper().replace(" WORD1", "\n   WORD1")
    for ours, theirs in zip(passages_of(WORDS), passages_of(wrapped), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_inserted_word_changes_one_passage_or_cuts_it():
    changed = set(passages_of(WORDS.replace("word200 ", "word200 inserted "))[0].tolist())
    assert 0 < len(set(passages_of(WORDS)[0].tolist()) - changed) <= 2


def test_passages_of_a_word_or_two_are_left_out():
    hashes, weights = passages_of("a word")
    assert len(hashes) == len(weights) == 0
    assert hashes.dtype == np.uint64 and weights.dtype == np.int32
    assert passages_of(WORDS)[1].min() >= 24
