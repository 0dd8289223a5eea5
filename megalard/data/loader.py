"""A step's micro-batches for one data-parallel rank, the next step's read ahead in a thread."""

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
    """Gives any step's micro-batches; they depend on the step alone, so a run resumes at any.

    Close it, or use it in a ``with`` statement, to end its thread.

    Args:
        blocks: the data, the same on every rank.
        seed: of the order of the blocks, non-negative.
        global_batch: blocks a step, over all ranks.
        micro_batch: blocks a micro-batch.
        dp_rank, dp_size: this rank's place among the data-parallel ranks. Ranks that share a
            sequence or a model's shards pass the same ``dp_rank`` and get the same rows.
        cp: the ranks that share the sequence of each block; the batches hold this rank's part.
        window: the student's, over which skipped positions spread.
        positions: contiguous, skip-gaussian or skip-uniform; see ``data.positions``.
        prefetch: read the following step in the background while this one is computed.

    Raises:
        UserError: the data is smaller than a global batch, the batch or the sequence does not
            divide, or the seed is negative.
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
        """This rank's micro-batches of ``step`` (from 0), on the host.

        Raises:
            UserError: the store is damaged where the step reads.
        """
        ahead, self._ahead = self._ahead, None
        is_ahead = ahead is not None and ahead[0] == step
        batches = ahead[1].result() if is_ahead else self._read(step)
        if self._thread is not None:
            self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        return batches

    def _read(self, step: int) -> list[Batch]:
        indices = sample_indices(self.seed, step, self.global_batch, len(self.blocks))
        places = np.arange(self.global_batch)
        shares = rank_indices(places, self.dp_rank, self.dp_size, self.micro_batch)
        return [
            collate(
                [self.blocks.block(int(i)) for i in indices[share]],
                share,
                self._student_positions(step, share),
            ).cut(self.cp)
            for share in shares
        ]

    def _student_positions(self, step: int, share: np.ndarray) -> list[np.ndarray] | None:
        """Drawn for a row of the global batch, whichever rank reads it."""
        if self.positions == "contiguous":
            return None
        middle = self.positions.removeprefix("skip-")
        length = self.blocks.context_length
        return [
            skipped_positions(length, self.window, middle, (self.seed, step, int(place)))
            for place in share
        ]

    def close(self) -> None:
        """Ends the thread, after what it is reading; ``step`` goes on working without it."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = self._ahead = None

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class StreamLoaders:
    """The loaders of all streams; ``step`` gives each one's micro-batches by name."""

    def __init__(self, loaders: dict[str, BatchLoader]):
        self.loaders = loaders

    def step(self, step: int, device: torch.device) -> dict[str, list[Batch]]:
        """This rank's micro-batches of ``step`` (from 0), on ``device``."""
        return {
            name: [batch.to(device) for batch in loader.step(step)]
            for name, loader in self.loaders.items()
        }

    def __enter__(self) -> "StreamLoaders":
        return self

    def __exit__(self, *exception: object) -> None:
        for loader in self.loaders.values():
            loader.close()
