"""The loader: the same global batch on any number of ranks, the same step after a restart."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from megalard.data.blocks import DocumentBlocks, PackedBlocks
from megalard.data.loader import BatchLoader
from megalard.data.token_store import TokenStore
from megalard.errors import UserError
from megalard.parallel.mesh import Axis
from tests.command_line import user_error


def rows(batches):
    """Return the token rows of micro-batches."""
    return [row for batch in batches for row in batch.tokens_bs.tolist()]


def expected_rows(blocks, seed: int, step: int, global_batch: int) -> list[list[int]]:
    """Return the token rows of a step: numpy's random order of each epoch, cut from the tokens."""
    order = [
        block
        for epoch in range(step * global_batch // len(blocks) + 2)
        for block in np.argsort(np.random.PCG64((seed, epoch)).random_raw(len(blocks)))
    ]
    taken = order[step * global_batch : (step + 1) * global_batch]
    return [blocks.store.tokens[16 * block : 16 * block + 16].tolist() for block in taken]


@pytest.fixture
def blocks(make_store):
    rng = np.random.default_rng(0)
    return PackedBlocks(make_store(rng.integers(2, 40, 40).tolist()), 16)


def test_a_resumed_loader_reads_what_the_first_would_have_read(blocks):
    steps = 2 * len(blocks) // 4 + 3
    with BatchLoader(blocks, seed=1, global_batch=4, micro_batch=2) as loader:
        straight = [rows(loader.step(step)) for step in range(steps)]
    assert straight == [expected_rows(blocks, 1, step, 4) for step in range(steps)]
    for start in (0, 3, steps - 2):
        for prefetch in (True, False):
            options = {"global_batch": 4, "micro_batch": 2, "prefetch": prefetch}
            with BatchLoader(blocks, seed=1, **options) as loader:
                assert [rows(loader.step(s)) for s in range(start, steps)] == straight[start:]
                assert rows(loader.step(start)) == straight[start]


def test_blocks_that_the_cp_ranks_cannot_share_are_refused(blocks):
    sentence = user_error(
        BatchLoader, blocks, seed=1, global_batch=4, micro_batch=2, cp=Axis(None, 0, 3)
    )
    assert sentence.startswith("a block of 16 tokens does not divide into 6 pieces")


def test_the_position_counts_blocks_and_epochs(make_store):
    """The text has seven blocks, and a step reads two of them."""
    blocks = PackedBlocks(make_store([70]), 10)
    assert len(blocks) == 7
    with BatchLoader(blocks, seed=1, global_batch=2, micro_batch=1, prefetch=False) as loader:
        positions = [[*loader.position_after(step).values()] for step in (0, 3, 4, 11)]
    assert positions == [[7, 0, 0, 0], [7, 6, 6, 0], [7, 8, 1, 1], [7, 22, 1, 3]]


def test_the_global_batch_is_the_same_for_every_number_of_ranks(blocks):
    expected = sorted(expected_rows(blocks, 1, 2, 8))
    for dp_size in (1, 2, 4):
        step = []
        for rank in range(dp_size):
            options = {"global_batch": 8, "micro_batch": 2, "dp_rank": rank, "dp_size": dp_size}
            with BatchLoader(blocks, seed=1, **options) as loader:
                batches = loader.step(2)
            assert len(batches) == 4 // dp_size
            assert all(batch.tokens_bs.shape == (2, 16) for batch in batches)
            step += rows(batches)
        assert sorted(step) == expected


def test_no_two_rows_of_a_step_have_the_same_skipped_positions(blocks):
    """The positions of a row depend neither on its rank nor on its micro-batch."""
    drawn = []
    for size, dp_size in ((1, 1), (4, 1), (2, 2)):
        step = []
        for rank in range(dp_size):
            options = {"dp_rank": rank, "dp_size": dp_size, "positions": "skip-uniform"}
            with BatchLoader(
                blocks, seed=1, global_batch=8, micro_batch=size, window=1000, **options
            ) as loader:
                for batch in loader.step(2):
                    positions = map(tuple, batch.for_student().position_bs.tolist())
                    step += zip(batch.sample_b.tolist(), positions, strict=True)
        drawn.append(sorted(step))
    assert drawn[0] == drawn[1] == drawn[2] and len({row for _, row in drawn[0]}) == 8


def test_documents_are_padded_by_themselves(make_store):
    blocks = DocumentBlocks(make_store([5, 9, 3, 12]), 8)
    with BatchLoader(blocks, seed=0, global_batch=len(blocks), micro_batch=1) as loader:
        batches = loader.step(0)
    # The second document leaves one token, which has no next one, and the fourth leaves four.
    assert sorted(batch.valid_tokens for batch in batches) == [3, 4, 5, 8, 8]
    assert all(torch.all(batch.doc_end_bn[0, batch.valid_tokens :] == 0) for batch in batches)


def test_batches_that_cannot_be_formed_are_refused(blocks):
    with pytest.raises(UserError, match="global batch of 1000"):
        BatchLoader(blocks, seed=0, global_batch=1000, micro_batch=1)
    with pytest.raises(UserError, match="does not divide"):
        BatchLoader(blocks, seed=0, global_batch=4, micro_batch=3)
    with pytest.raises(UserError, match="seed is -1"):
        BatchLoader(blocks, seed=-1, global_batch=4, micro_batch=2)


def test_closing_ends_the_thread_and_errors_of_the_thread_are_raised(blocks):
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
