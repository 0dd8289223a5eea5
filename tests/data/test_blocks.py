import numpy as np
import pytest
import torch
from data_helpers import EOS

from megalard.data.batch import collate
from megalard.data.blocks import DocumentBlocks, PackedBlocks
from megalard.errors import UserError


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


def test_packed_boundary_on_the_block_edge(make_store):
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
def test_bad_arguments(make_store, kind):
    store = make_store([3, 40])
    with pytest.raises(UserError, match="context length is 1"):
        kind(store, 1)
    blocks = kind(store, 8)
    for index in (-1, len(blocks)):
        with pytest.raises(IndexError):
            blocks.block(index)
    with pytest.raises(UserError, match="min_tokens is 9"):
        DocumentBlocks(store, 8, min_tokens=9)


def test_batch_says_where_each_token_is(make_store):
    packed = PackedBlocks(make_store([3, 7, 2]), 6)
    padded = DocumentBlocks(packed.store, 6)
    batch = collate([packed.block(0), padded.block(0)])
    assert batch.documents == ((0, 0, 3), (0, 3, 6), (1, 0, 3))
    assert batch.valid_tokens == 9
    assert batch.position_bs.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 0, 0]]
    assert batch.doc_start_bn.tolist() == [[0, 0, 0, 3, 3, 3], [0] * 6]
    assert batch.doc_end_bn.tolist() == [[3, 3, 3, 6, 6, 6], [3, 3, 3, 0, 0, 0]]
    assert batch.tokens_bs.tolist()[1] == [97, 97, EOS, EOS, EOS, EOS]
    assert batch.target_bs.tolist() == [[97, EOS, -1, 98, 98, -1], [97, EOS, *[-1] * 4]]
    assert batch.place_s.tolist() == list(range(6)) and batch.sample_b.tolist() == [0, 1]
    assert batch.tokens_bs.dtype == batch.position_bs.dtype == torch.int64
    assert batch.doc_start_bn.dtype == batch.doc_end_bn.dtype == torch.int32
    moved = batch.to("cpu")
    assert moved.documents is batch.documents and torch.equal(moved.tokens_bs, batch.tokens_bs)
    with pytest.raises(AttributeError):
        batch.documents = ()


@pytest.mark.gpu
def test_batch_moves_to_the_gpu(make_store):
    batch = collate([PackedBlocks(make_store([3, 7, 2]), 6).block(0)])
    moved = batch.to("cuda")
    for name in ("tokens_bs", "position_bs", "doc_start_bn", "doc_end_bn"):
        assert getattr(moved, name).is_cuda
        assert torch.equal(getattr(moved, name).cpu(), getattr(batch, name))
