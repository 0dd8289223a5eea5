import threading

import numpy as np
import pytest
import torch

from megalard.data.blocks import DocumentBlocks, PackedBlocks
from megalard.data.loader import BatchLoader
from megalard.data.sampler import (
    check_enough_blocks,
    check_global_batch,
    rank_indices,
    sample_indices,
)
from megalard.data.token_store import TokenStore
from megalard.errors import UserError

# A run saved before an upgrade reads on in this order: do not renew these numbers.
ORDER_OF_SEED_0 = [3, 2, 1, 6, 0, 7, 4, 5]
ORDER_OF_SEED_7_EPOCH_3 = [2, 4, 7, 3, 5, 1, 0, 6]


@pytest.mark.parametrize(("global_batch", "num_blocks"), [(4, 10), (5, 10), (7, 7), (9, 4), (1, 3)])
def test_epochs_follow_each_other_without_gap_or_repeat(global_batch, num_blocks):
    steps = [sample_indices(3, step, global_batch, num_blocks) for step in range(4 * num_blocks)]
    assert all(x.dtype == np.int64 and x.shape == (global_batch,) for x in steps)
    epochs = np.concatenate(steps)[: 4 * num_blocks].reshape(4, num_blocks)
    assert np.array_equal(np.sort(epochs, 1), np.tile(np.arange(num_blocks), (4, 1)))


def test_order_depends_on_seed_and_epoch_alone():
    forward = [sample_indices(0, step, 6, 40).tolist() for step in range(30)]
    backward = [sample_indices(0, step, 6, 40).tolist() for step in reversed(range(30))]
    assert forward == backward[::-1]
    first, second = (np.concatenate(forward)[40 * e : 40 * e + 40].tolist() for e in (0, 1))
    assert first != second
    assert sample_indices(1, 0, 40, 40).tolist() != first


def test_order_is_the_same_in_every_release():
    assert sample_indices(0, 0, 8, 8).tolist() == ORDER_OF_SEED_0
    assert sample_indices(7, 3, 8, 8).tolist() == ORDER_OF_SEED_7_EPOCH_3


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_global_batch_is_the_same_for_every_number_of_ranks(micro_batch):
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


def rows(batches):
    return [row for batch in batches for row in batch.tokens_bs.tolist()]


@pytest.fixture
def blocks(make_store):
    rng = np.random.default_rng(0)
    return PackedBlocks(make_store(rng.integers(2, 40, 40).tolist()), 16)


def test_resumed_loader_reads_what_the_first_would_have(blocks):
    steps = 2 * len(blocks) // 4 + 3
    with BatchLoader(blocks, seed=1, global_batch=4, micro_batch=2) as loader:
        straight = [rows(loader.step(step)) for step in range(steps)]
    for start in (0, 3, steps - 2):
        for prefetch in (True, False):
            options = {"global_batch": 4, "micro_batch": 2, "prefetch": prefetch}
            with BatchLoader(blocks, seed=1, **options) as loader:
                assert [rows(loader.step(s)) for s in range(start, steps)] == straight[start:]
                assert rows(loader.step(start)) == straight[start]


def test_loader_gives_the_same_global_batch_for_every_number_of_ranks(blocks):
    seen = set()
    for dp_size in (1, 2, 4):
        step = []
        for rank in range(dp_size):
            options = {"global_batch": 8, "micro_batch": 2, "dp_rank": rank, "dp_size": dp_size}
            with BatchLoader(blocks, seed=1, **options) as loader:
                batches = loader.step(2)
            assert len(batches) == 4 // dp_size
            assert all(batch.tokens_bs.shape == (2, 16) for batch in batches)
            step += rows(batches)
        seen.add(tuple(map(tuple, sorted(step))))
    assert len(seen) == 1


def test_loader_of_documents(make_store):
    blocks = DocumentBlocks(make_store([5, 9, 3, 12]), 8)
    with BatchLoader(blocks, seed=0, global_batch=len(blocks), micro_batch=1) as loader:
        batches = loader.step(0)
    assert sum(batch.valid_tokens for batch in batches) == blocks.tokens
    assert all(torch.all(batch.doc_end_bn[0, batch.valid_tokens :] == 0) for batch in batches)


def test_loader_refuses_what_it_cannot_serve(blocks):
    with pytest.raises(UserError, match="global batch of 1000"):
        BatchLoader(blocks, seed=0, global_batch=1000, micro_batch=1)
    with pytest.raises(UserError, match="does not divide"):
        BatchLoader(blocks, seed=0, global_batch=4, micro_batch=3)
    with pytest.raises(UserError, match="seed is -1"):
        BatchLoader(blocks, seed=-1, global_batch=4, micro_batch=2)


def test_loader_ends_its_thread_and_passes_its_errors_on(blocks):
    def threads():
        return [t for t in threading.enumerate() if t.name.startswith("batch-loader")]

    before = len(threads())
    loader = BatchLoader(blocks, seed=0, global_batch=2, micro_batch=1)
    loader.step(0)
    assert len(threads()) == before + 1
    loader.close()
    loader.close()
    assert len(threads()) == before
    assert rows(loader.step(1))

    path = blocks.store.path / "tokens.bin"
    np.full(len(blocks.store.tokens), 60_000, np.uint16).tofile(path)
    damaged = PackedBlocks(TokenStore.open(path.parent), 16)
    with BatchLoader(damaged, seed=0, global_batch=2, micro_batch=1) as loader:
        with pytest.raises(UserError, match="damaged"):
            loader.step(0)
        loader._ahead = (1, loader._thread.submit(loader._read, 1))
        with pytest.raises(UserError, match="damaged"):
            loader.step(1)
