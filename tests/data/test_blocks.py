"""Blocks of equal length, cut from documents end to end or from each document by itself."""

from __future__ import annotations

import numpy as np
import pytest

from megalard.data.blocks import DocumentBlocks, PackedBlocks
from megalard.errors import UserError
from tests.small_tokenizers import EOS


def test_packed_blocks_keep_every_token_and_boundary(make_store):
    rng = np.random.default_rng(0)
    store = make_store(rng.integers(1, 20, 60).tolist())
    blocks = PackedBlocks(store, 16)
    assert len(blocks) == len(store.tokens) // 16 and blocks.tokens == 16 * len(blocks)
    read = [blocks.block(i) for i in range(len(blocks))]
    stream = np.concatenate([tokens for tokens, _ in read])
    assert stream.dtype == np.int64
    assert np.array_equal(stream, store.tokens[: len(stream)])

    inside = set(store.documents.tolist())
    for index, (_, intervals) in enumerate(read):
        starts, ends = zip(*intervals, strict=True)
        assert starts == (0, *ends[:-1]) and ends[-1] == 16
        assert all(start < end for start, end in intervals)
        cuts = {16 * index + end for end in ends[:-1]}
        assert cuts == {cut for cut in inside if 16 * index < cut < 16 * (index + 1)}


def test_a_document_may_end_with_a_packed_block(make_store):
    blocks = PackedBlocks(make_store([4, 8, 3, 1, 9]), 4)
    assert [blocks.block(i)[1] for i in range(len(blocks))] == [
        [(0, 4)],
        [(0, 4)],
        [(0, 4)],
        [(0, 3), (3, 4)],
        [(0, 4)],
        [(0, 4)],
    ]


def test_document_blocks_never_mix_documents(make_store):
    store = make_store([1, 9, 4, 1, 1, 5, 2, 8])
    blocks = DocumentBlocks(store, 4)
    pieces = []
    for index in range(len(blocks)):
        tokens, [(start, end)] = blocks.block(index)
        assert tokens.shape == (4,) and tokens.dtype == np.int64
        assert start == 0 and end >= 2 and np.all(tokens[end:] == EOS)
        pieces.append(tokens[:end].tolist())
    b, c, f, g, h = (ord(x) for x in "bcfgh")
    expected = [[b] * 4, [b] * 4, [c] * 3 + [EOS], [f] * 4, [g, EOS], [h] * 4, [h] * 3 + [EOS]]
    assert pieces == expected
    assert blocks.tokens == sum(map(len, expected))
    assert len(DocumentBlocks(store, 4, min_tokens=1)) == 7 + 5
    assert len(DocumentBlocks(store, 4, min_tokens=4)) == 6


def test_documents_without_a_block_leave_no_gap(make_store):
    assert len(DocumentBlocks(make_store([1, 1, 1]), 8)) == 0
    assert len(PackedBlocks(make_store([1, 1, 1], "packed"), 8)) == 0


@pytest.mark.parametrize("kind", [PackedBlocks, DocumentBlocks])
def test_bad_arguments_are_refused(make_store, kind):
    store = make_store([3, 40])
    with pytest.raises(UserError, match="context length is 1"):
        kind(store, 1)
    blocks = kind(store, 8)
    for index in (-1, len(blocks)):
        with pytest.raises(IndexError):
            blocks.block(index)
    with pytest.raises(UserError, match="min_tokens is 9"):
        DocumentBlocks(store, 8, min_tokens=9)
