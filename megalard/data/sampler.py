"""Which blocks a step reads: a pure function of the seed and the step.

A checkpoint therefore holds no state of the sampler.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from megalard.errors import UserError


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, num_blocks: int) -> np.ndarray:
    # A resumed run must continue in the same order. numpy promises that the raw stream of a bit
    # generator stays the same in every release; it does not promise this of Generator.permutation.
    raw = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_blocks)
    permutation = np.argsort(raw, kind="stable")
    permutation.flags.writeable = False
    return permutation


def sample_indices(seed: int, step: int, global_batch: int, num_blocks: int) -> np.ndarray:
    """Return the blocks of the global batch of a step, int64 [global_batch].

    Steps read one permutation of all blocks per epoch. Every block is read once per epoch, and a
    batch that meets the end of an epoch continues with the next one.

    Args:
        seed: a non-negative number.
        step: the step, counted from 0.
    """
    epoch, offset = divmod(step * global_batch, num_blocks)
    parts, missing = [], global_batch
    while missing:
        part = _permutation(seed, epoch, num_blocks)[offset : offset + missing]
        parts.append(part)
        missing -= len(part)
        epoch, offset = epoch + 1, 0
    return np.concatenate(parts)


def rank_indices(
    indices: np.ndarray, dp_rank: int, dp_size: int, micro_batch: int
) -> list[np.ndarray]:
    """Return one data-parallel rank's share of a global batch: int64 [micro_batch] per micro-batch.

    For every ``dp_size`` the shares of all ranks together are the global batch, each entry once.

    Raises:
        UserError: the global batch does not divide into the ranks' micro-batches.
    """
    check_global_batch(len(indices), dp_size, micro_batch)
    return list(indices.reshape(-1, dp_size, micro_batch)[:, dp_rank])


def check_global_batch(global_batch: int, dp_size: int, micro_batch: int) -> None:
    """Refuse a global batch that is not a multiple of ranks times micro-batch.

    Raises:
        UserError: the global batch is not such a multiple, or a number is below 1.
    """
    if min(global_batch, micro_batch) < 1:
        raise UserError(
            f"the global batch is {global_batch} and the micro-batch {micro_batch}: "
            "set both to 1 or more"
        )
    share = dp_size * micro_batch
    if global_batch % share:
        near = max(share, round(global_batch / share) * share)
        raise UserError(
            f"a global batch of {global_batch} does not divide into micro-batches of {micro_batch} "
            f"on {dp_size} data-parallel ranks: set it to a multiple of {share}, such as {near}"
        )


def check_enough_blocks(num_blocks: int, global_batch: int, context_length: int) -> None:
    """Refuse data that is too small for one step.

    Raises:
        UserError: there are fewer blocks than one global batch takes.
    """
    if num_blocks < global_batch:
        raise UserError(
            f"the data has {num_blocks} blocks of {context_length} tokens but one step reads a "
            f"global batch of {global_batch} ({global_batch * context_length} tokens): add text, "
            "or lower the global batch or the context length"
        )
