"""Losses on the next-token distribution: KL(teacher || student), and cross-entropy.

Logits exist for a chunk of rows at a time, forward and backward, whatever the block's length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megalard.data.batch import Batch
from megalard.model.decoder import Decoder
from megalard.parallel.tensor.vocab import cross_entropy, kl_divergence
from megalard.transfer import to_device

_ROWS = 1024


def chosen_rows(batch: Batch, last: int | None) -> torch.Tensor:
    """The last ``last`` valid tokens of each block, as places among this rank's [b * s] tokens.

    None chooses every valid token. int64, on the host.
    """
    blocks, length = batch.tokens_bs.shape
    # the first token of each row that counts
    first = [0] * blocks
    missing = [batch.shard.length if last is None else last] * blocks
    for row, start, end in sorted(batch.documents, reverse=True):
        if 0 < missing[row] <= end - start:
            first[row] = end - missing[row]
        missing[row] -= end - start
    places, chosen = batch.shard.own_positions(), [torch.empty(0, dtype=torch.int64)]
    for span in batch.spans:
        tokens = torch.arange(span.start, span.end)
        chosen.append(span.row * length + tokens[places[tokens] >= first[span.row]])
    return torch.cat(chosen)


def logits_kl_sum(
    teacher: Decoder,
    student: Decoder,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Σ over the chosen rows of KL(teacher || student), a scalar to differentiate.

    A rank without a chosen row takes part all the same, since the backward pass of every layer is
    a collective.

    Args:
        x_t, x_s: final residuals [t/tp, hidden], before the last norm.
        rows: of ``chosen_rows``.
    """
    axis = student.ops.axis
    index = to_device(rows, x_s.device)
    hidden_s = student.ops.gather(student.model.norm(x_s)).index_select(0, index)
    with torch.no_grad():
        hidden_t = teacher.ops.gather(teacher.model.norm(x_t)).index_select(0, index)

    def chunk(h_s, h_t, weight_s, weight_t):
        logits_s = F.linear(h_s, weight_s.to(h_s.dtype)).float()
        logits_t = F.linear(h_t, weight_t.to(h_t.dtype)).float()
        return kl_divergence(logits_s, logits_t, axis).sum()

    weights = student.head_weight, teacher.head_weight
    return _sum_of_chunks(chunk, (hidden_s, hidden_t), weights)


def cross_entropy_sum(student: Decoder, x_s: torch.Tensor, target_bs: torch.Tensor) -> torch.Tensor:
    """Σ over the tokens with a target of -log p(target), a scalar to differentiate.

    Args:
        x_s: final residual [t/tp, hidden], before the last norm.
        target_bs: int64 [b, s] of this rank's tokens; negative where there is none.
    """
    axis, first = student.ops.axis, student.first_vocab_row
    hidden = student.ops.gather(student.model.norm(x_s))

    def chunk(h, target, weight):
        logits = F.linear(h, weight.to(h.dtype)).float()
        loss = cross_entropy(logits, target.clamp(min=0), first, axis)
        return (loss * (target >= 0)).sum()

    return _sum_of_chunks(chunk, (hidden, target_bs.flatten()), (student.head_weight,))


def _sum_of_chunks(chunk, tensors: tuple[torch.Tensor, ...], weights: tuple[torch.Tensor, ...]):
    """Σ of ``chunk(*rows of tensors, *weights)``; each chunk is recomputed in the backward pass."""
    total = tensors[0].new_zeros((), dtype=torch.float32)
    for rows in zip(*(x.split(_ROWS) for x in tensors), strict=True):
        total = total + checkpoint(
            chunk, *rows, *weights, use_reentrant=False, preserve_rng_state=False
        )
    return total
