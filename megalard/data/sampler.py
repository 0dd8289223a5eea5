"""Which blocks a step reads: a pure function of the seed and the step, so that nothing is saved."""

from functools import lru_cache

import numpy as np

from megalard.errors import UserError


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, num_blocks: int) -> np.ndarray:
    # numpy keeps a bit generator's raw stream the same in every release, but not what
    # Generator.permutation makes of it, and a resumed run must read on in the same order.
    raw = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_blocks)
    permutation = np.argsort(raw, kind="stable")
    permutation.flags.writeable = False
    return permutation


def sample_indices(seed: int, step: int, global_batch: int, num_blocks: int) -> np.ndarray:
    """The blocks of the global batch of ``step``, int64 ``[global_batch]``.

    Steps read the epochs' permutations one after another: every block once an epoch, no block left
    out, and a batch that meets an epoch's end goes on into the next.

    Args:
        seed: non-negative, as ``step``, which counts from 0.
    """
    first = step * global_batch
    epoch, offset = divmod(first, num_blocks)
    parts, wanted = [], global_batch
    while wanted:
        part = _permutation(seed, epoch, num_blocks)[offset : offset + wanted]
        parts.append(part)
        wanted -= len(part)
        epoch, offset = epoch + 1, 0
    return np.concatenate(parts)


def rank_indices(
    indices: np.ndarray, dp_rank: int, dp_size: int, micro_batch: int
) -> list[np.ndarray]:
    """This data-parallel rank's share of a global batch, one int64 ``[micro_batch]`` a micro-step.

    Over ranks and micro-steps the shares are the global batch, each entry once, for every
    ``dp_size``.

    Raises:
        UserError: the global batch does not divide into the ranks' micro-batches.
    """
    check_global_batch(len(indices), dp_size, micro_batch)
    return list(indices.reshape(-1, dp_size, micro_batch)[:, dp_rank])


def check_global_batch(global_batch: int, dp_size: int, micro_batch: int) -> None:
    """Refuses a global batch that the ranks' micro-batches do not make up.

    Raises:
        UserError: a number is below 1, or the global batch is no multiple of ranks × micro-batch.
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
    """Refuses data too small for one step.

    Raises:
        UserError: there are fewer blocks than one global batch takes.
    """
    if num_blocks < global_batch:
        raise UserError(
            f"the data gives {num_blocks} blocks of {context_length} tokens but one step reads a "
            f"global batch of {global_batch} ({global_batch * context_length} tokens): add text, "
            "or lower the global batch or the context length"
        )
