"""What is taken from a batch: some of its blocks, some of its tokens."""

import numpy as np
import pytest
import torch

from megalard.data.batch import Batch, collate
from megalard.distill.logits import chosen_rows
from megalard.parallel.mesh import Axis

LENGTH = 24
BLOCKS = [
    (np.arange(LENGTH), [(0, 5), (5, LENGTH)]),
    (np.arange(100, 100 + LENGTH), [(3, 9), (11, 12)]),
    (np.arange(200, 200 + LENGTH), [(0, LENGTH)]),
    (np.arange(300, 300 + LENGTH), []),
]


def assert_equal(ours: Batch, other: Batch) -> None:
    for name, value in vars(other).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(ours, name), value), name
        else:
            assert getattr(ours, name) == value, name


@pytest.mark.parametrize(("first", "end"), [(0, 2), (1, 3), (2, 4), (0, 4)])
def test_some_blocks_of_a_batch_are_the_batch_of_these_blocks(first, end):
    samples = [7, 3, 0, 5]
    positions = [np.arange(LENGTH) + 10 * row for row in range(len(BLOCKS))]
    whole = collate(BLOCKS, samples, positions)
    part = slice(first, end)
    assert_equal(whole.rows(first, end), collate(BLOCKS[part], samples[part], positions[part]))


@pytest.mark.parametrize("last", [None, 1, 4, 7, LENGTH, LENGTH + 1])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_last_valid_tokens_of_each_block_are_chosen(last, ranks):
    found = []
    for rank in range(ranks):
        batch = collate(BLOCKS).cut(Axis(None, rank, ranks))
        found += batch.tokens_bs.flatten()[chosen_rows(batch, last)].tolist()
    expected = []
    for tokens, documents in BLOCKS:
        valid = [int(tokens[i]) for start, end in documents for i in range(start, end)]
        # a block with fewer gives what it has
        expected += valid if last is None or len(valid) < last else valid[-last:]
    assert sorted(found) == expected
