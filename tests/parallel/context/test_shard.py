"""Which tokens of a block a rank owns, and the gather that puts the chunks in order."""

from __future__ import annotations

import pytest
import torch

from megalard.parallel.context.shard import SequenceShard, Span
from megalard.parallel.mesh import Axis, build_mesh
from tests.command_line import user_error
from tests.ranks import run_ranks


def shard(length: int, rank: int, ranks: int) -> SequenceShard:
    return SequenceShard(length, Axis(None, rank, ranks))


def test_ranks_own_pieces_in_a_zigzag():
    positions = [shard(16, rank, 4).local_positions().tolist() for rank in range(4)]
    assert positions == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert shard(16, 0, 1).local_positions().tolist() == list(range(16))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_cut_has_the_local_tokens(dim):
    x = torch.arange(24.0).view(2, 12).movedim(1, 0)[:, :, None].movedim(0, dim)
    assert x.shape[dim] == 12
    part = shard(12, 1, 3).cut(x, dim)
    assert torch.equal(part, x.index_select(dim, torch.tensor([2, 3, 8, 9])))


def test_spans_are_the_queries_of_each_document():
    """Rank 0 of 2 owns the tokens 0 to 3 and 12 to 15 of a block of 16."""
    documents = ((0, 0, 2), (0, 2, 14), (1, 4, 12))
    assert shard(16, 0, 2).spans(documents) == (
        Span(row=0, start=0, end=2, key_start=0, key_end=2),
        Span(row=0, start=2, end=4, key_start=2, key_end=4),
        Span(row=0, start=4, end=6, key_start=2, key_end=14),
    )


def test_a_length_that_does_not_divide_is_refused():
    assert user_error(shard, 14, 0, 2) == (
        "a block of 14 tokens does not divide into 4 pieces (two for each of 2 cp ranks): choose a "
        "multiple of 4"
    )


def _gather(size: int) -> None:
    """Gathering restores the order; the gradients are summed over ranks and cut."""
    axis = build_mesh("cpu", 1, size).cp
    shard = SequenceShard(6 * size, axis)
    full = torch.arange(2.0 * shard.length).view(1, 1, shard.length, 2)
    local = shard.cut(full, 2).requires_grad_()
    gathered = shard.gather(local)
    assert torch.equal(gathered, full)
    upstream = torch.arange(2.0 * shard.length).view_as(full) + 100 * axis.rank
    gathered.backward(upstream)
    total = size * torch.arange(2.0 * shard.length).view_as(full) + 100 * sum(range(size))
    assert torch.equal(local.grad, shard.cut(total, 2))


@pytest.mark.parametrize("size", [2, 3])
def test_gathering_restores_the_order_of_the_block(size):
    run_ranks(size, _gather, size)
