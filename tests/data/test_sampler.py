"""Which blocks a step reads: a pure function of the seed and the step."""

from __future__ import annotations

import numpy as np
import pytest

from megalard.data.sampler import (
    check_enough_blocks,
    check_global_batch,
    rank_indices,
    sample_indices,
)
from megalard.errors import UserError

# A run that was saved before an upgrade continues in this order: do not update these numbers.
ORDER_OF_SEED_0 = [3, 2, 1, 6, 0, 7, 4, 5]
ORDER_OF_SEED_7_EPOCH_3 = [2, 4, 7, 3, 5, 1, 0, 6]


@pytest.mark.parametrize(("global_batch", "num_blocks"), [(4, 10), (5, 10), (7, 7), (9, 4), (1, 3)])
def test_every_block_is_read_once_per_epoch(global_batch, num_blocks):
    steps = [sample_indices(3, step, global_batch, num_blocks) for step in range(4 * num_blocks)]
    assert all(x.dtype == np.int64 and x.shape == (global_batch,) for x in steps)
    epochs = np.concatenate(steps)[: 4 * num_blocks].reshape(4, num_blocks)
    assert np.array_equal(np.sort(epochs, 1), np.tile(np.arange(num_blocks), (4, 1)))


def test_the_order_depends_on_seed_and_epoch_alone():
    forward = [sample_indices(0, step, 6, 40).tolist() for step in range(30)]
    backward = [sample_indices(0, step, 6, 40).tolist() for step in reversed(range(30))]
    assert forward == backward[::-1]
    first, second = (np.concatenate(forward)[40 * e : 40 * e + 40].tolist() for e in (0, 1))
    assert first != second
    assert sample_indices(1, 0, 40, 40).tolist() != first


def test_the_order_is_the_same_in_every_release():
    assert sample_indices(0, 0, 8, 8).tolist() == ORDER_OF_SEED_0
    assert sample_indices(7, 3, 8, 8).tolist() == ORDER_OF_SEED_7_EPOCH_3


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_global_batch_is_the_same_for_every_number_of_ranks(micro_batch):
    indices = sample_indices(0, 5, 24, 100)
    for dp_size in (1, 2, 3, 4, 6, 12):
        shares = [rank_indices(indices, rank, dp_size, micro_batch) for rank in range(dp_size)]
        assert {len(share) for share in shares} == {24 // dp_size // micro_batch}
        assert all(part.shape == (micro_batch,) for share in shares for part in share)
        union = np.concatenate([part for share in shares for part in share])
        assert sorted(union) == sorted(indices)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"global batch of 10 .* multiple of 6, such as 12"):
        rank_indices(np.arange(10), 0, 3, 2)
    with pytest.raises(UserError, match=r"multiple of 8, such as 8"):
        check_global_batch(3, 4, 2)
    with pytest.raises(UserError, match="micro-batch 0"):
        check_global_batch(4, 1, 0)
    check_enough_blocks(8, 8, 16)
    with pytest.raises(
        UserError, match=r"7 blocks of 16 tokens .* global batch of 8 \(128 tokens\)"
    ):
        check_enough_blocks(7, 8, 16)
