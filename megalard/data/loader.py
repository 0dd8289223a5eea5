"""The micro-batches of one data-parallel rank; a thread reads those of the next step ahead."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from megalard.data.batch import Batch, collate
from megalard.data.blocks import Blocks
from megalard.data.positions import skipped_positions
from megalard.data.sampler import (
    check_enough_blocks,
    check_global_batch,
    rank_indices,
    sample_indices,
)
from megalard.errors import UserError
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import SINGLE, Axis


class BatchLoader:
    """Returns the micro-batches of any step of one stream.

    The micro-batches depend on the step alone, so that a run can resume at any step. Close the
    loader, or use it in a ``with`` statement, to end its thread.

    Args:
        blocks: the data, the same on every rank.
        seed: non-negative seed of the order of the blocks.
        global_batch: blocks per step, over all ranks.
        micro_batch: blocks per micro-batch.
        dp_rank, dp_size: the place of this rank among the data-parallel ranks. Ranks that share
            blocks or the model's weights pass the same ``dp_rank`` and get the same rows.
        cp: the axis of the ranks that share the tokens of each block.
        window: the student's window, over which skipped positions are spread.
        positions: contiguous, skip-gaussian or skip-uniform; see ``megalard.data.positions``.
        prefetch: whether a thread reads the next step ahead.

    Raises:
        UserError: the data is smaller than a global batch, the batch or the blocks do not divide
            over the ranks, or the seed is negative.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp: Axis = SINGLE,
        window: int | None = None,
        positions: str = "contiguous",
        prefetch: bool = True,
    ):
        if seed < 0:
            raise UserError(f"the data seed is {seed}: set it to 0 or more")
        check_global_batch(global_batch, dp_size, micro_batch)
        check_enough_blocks(len(blocks), global_batch, blocks.context_length)
        SequenceShard(blocks.context_length, cp)
        self.blocks, self.cp = blocks, cp
        self.seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.window, self.positions = window, positions
        self._thread = ThreadPoolExecutor(1, "batch-loader") if prefetch else None
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def step(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step, counted from 0, on the host.

        Raises:
            UserError: the token store is damaged where the step reads it.
        """
        ahead, self._ahead = self._ahead, None
        is_ahead = ahead is not None and ahead[0] == step
        batches = ahead[1].result() if is_ahead else self._read(step)
        if self._thread is not None:
            self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        return batches

    def position_after(self, step: int) -> dict[str, int]:
        """Return how far the stream has been read after ``step`` steps, for a checkpoint."""
        blocks, blocks_read = len(self.blocks), step * self.global_batch
        return {
            "blocks": blocks,
            "blocks_read": blocks_read,
            "next_block": blocks_read % blocks,
            "epoch": blocks_read // blocks,
        }

    def _read(self, step: int) -> list[Batch]:
        indices = sample_indices(self.seed, step, self.global_batch, len(self.blocks))
        samples = np.arange(self.global_batch)
        shares = rank_indices(samples, self.dp_rank, self.dp_size, self.micro_batch)
        return [
            collate(
                [self.blocks.block(int(i)) for i in indices[share]],
                share,
                self._student_positions(step, share),
            ).cut(self.cp)
            for share in shares
        ]

    def _student_positions(self, step: int, share: np.ndarray) -> list[np.ndarray] | None:
        """Draw positions for rows of the global batch; they do not depend on who reads a row."""
        if self.positions == "contiguous":
            return None
        middle = self.positions.removeprefix("skip-")
        length = self.blocks.context_length
        return [
            skipped_positions(length, self.window, middle, (self.seed, step, int(sample)))
            for sample in share
        ]

    def close(self) -> None:
        """End the thread after what it is reading; ``step`` continues to work without it."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = self._ahead = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class StreamLoaders:
    """The loaders of all streams of a step, by name."""

    def __init__(self, loaders: dict[str, BatchLoader]):
        self.loaders = loaders

    def step(self, step: int, device: torch.device) -> dict[str, list[Batch]]:
        """Return this rank's micro-batches of a step, counted from 0, by stream, on ``device``."""
        return {
            name: [batch.to(device) for batch in loader.step(step)]
            for name, loader in self.loaders.items()
        }

    def __enter__(self) -> StreamLoaders:
        return self

    def __exit__(self, *exception: object) -> None:
        for loader in self.loaders.values():
            loader.close()
