"""Batches: where each token is, what a rank owns, and which tokens are padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalard.data.batch import collate
from megalard.data.blocks import DocumentBlocks, PackedBlocks
from megalard.errors import UserError
from megalard.parallel.mesh import Axis
from tests.small_tokenizers import EOS


def test_a_batch_has_the_place_of_each_token(make_store):
    packed = PackedBlocks(make_store([3, 7, 2]), 6)
    padded = DocumentBlocks(packed.store, 6)
    batch = collate([packed.block(0), padded.block(0)])
    assert batch.documents == ((0, 0, 3), (0, 3, 6), (1, 0, 3))
    assert batch.valid_tokens == 9
    assert batch.position_bs.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 0, 0]]
    assert batch.doc_start_bn.tolist() == [[0, 0, 0, 3, 3, 3], [0] * 6]
    assert batch.doc_end_bn.tolist() == [[3, 3, 3, 6, 6, 6], [3, 3, 3, 0, 0, 0]]
    assert batch.valid_bs().tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert batch.tokens_bs.tolist()[1] == [97, 97, EOS, EOS, EOS, EOS]
    assert batch.target_bs.tolist() == [[97, EOS, -1, 98, 98, -1], [97, EOS, *[-1] * 4]]
    assert batch.place_s.tolist() == list(range(6)) and batch.sample_b.tolist() == [0, 1]
    assert batch.tokens_bs.dtype == batch.position_bs.dtype == torch.int64
    assert batch.doc_start_bn.dtype == batch.doc_end_bn.dtype == torch.int32
    moved = batch.to("cpu")
    assert moved.documents is batch.documents and torch.equal(moved.tokens_bs, batch.tokens_bs)
    with pytest.raises(AttributeError):
        batch.documents = ()


def test_positions_of_a_document_stay_within_it():
    batch = collate([(np.arange(6), [(0, 3), (3, 6)]), (np.arange(6), [(0, 1)])])
    assert batch.position_bs.tolist() == [[0, 1, 2, 0, 1, 2], [0] * 6]


BLOCK = (np.arange(100, 108), [(0, 3), (3, 7)])


def test_a_rank_owns_one_early_and_one_late_piece():
    """Of eight tokens on two ranks: the pieces 0 and 3, and the pieces 1 and 2."""
    first, second = (collate([BLOCK]).cut(Axis(None, rank, 2)) for rank in range(2))
    assert first.tokens_bs.tolist() == [[100, 101, 106, 107]]
    assert second.tokens_bs.tolist() == [[102, 103, 104, 105]]
    assert first.target_bs.tolist() == [[101, 102, -1, -1]]
    assert second.target_bs.tolist() == [[-1, 104, 105, 106]]
    assert first.position_bs.tolist() == [[0, 1, 3, 0]]
    assert first.place_s.tolist() == [0, 1, 6, 7]
    assert first.valid_bs().tolist() == [[True, True, True, False]] and first.valid_tokens == 3
    # The documents and their intervals remain those of the block.
    assert first.documents == second.documents == ((0, 0, 3), (0, 3, 7))
    assert torch.equal(first.doc_end_bn, second.doc_end_bn) and first.doc_end_bn.shape == (1, 8)


def test_a_block_that_ranks_do_not_divide_is_refused():
    with pytest.raises(UserError, match=r"a block of 8 tokens .* choose a multiple of 6"):
        collate([BLOCK]).cut(Axis(None, 0, 3))


def test_tokens_have_numbers_that_are_unique_within_the_step():
    """LoRA's dropout is drawn from them, whichever rank reads a token."""
    batch = collate([BLOCK, BLOCK], samples=[5, 2])
    assert batch.token_ids().tolist() == [*range(40, 48), *range(16, 24)]
    parts = [batch.cut(Axis(None, rank, 2)).token_ids().tolist() for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(batch.token_ids().tolist())


def test_the_student_may_read_at_other_positions():
    positions = np.array([0, 1, 2, 50, 51, 52, 60, 63])
    batch = collate([BLOCK], student_positions=[positions])
    assert batch.position_bs.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.for_student().position_bs.tolist() == [positions.tolist()]
    assert collate([BLOCK]).for_student().position_bs.tolist() == batch.position_bs.tolist()
    # The RoPE of longrope depends on the largest position of a document, not on its length.
    assert batch.reach_bs.tolist() == [[3, 3, 3, 4, 4, 4, 4, 0]]
    assert batch.for_student().reach_bs.tolist() == [[3, 3, 3, 61, 61, 61, 61, 0]]
    second = batch.for_student().cut(Axis(None, 1, 2))
    assert second.reach_bs.tolist() == [[3, 61, 61, 61]]


@pytest.mark.gpu
def test_a_batch_moves_to_the_gpu(make_store):
    batch = collate([PackedBlocks(make_store([3, 7, 2]), 6).block(0)])
    moved = batch.to("cuda")
    for name in ("tokens_bs", "position_bs", "doc_start_bn", "doc_end_bn"):
        assert getattr(moved, name).is_cuda
        assert torch.equal(getattr(moved, name).cpu(), getattr(batch, name))
