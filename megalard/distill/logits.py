"""Optional second term: KL(teacher || student) of the next-token distributions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megalard.data.batch import Batch
from megalard.distill.lockstep import Residuals
from megalard.model.decoder import Decoder
from megalard.parallel.vocab import kl_divergence

_ROWS = 1024


def chosen_rows(batch: Batch, last: int | None) -> list[int]:
    """The last ``last`` valid tokens of each block, as places among this rank's [b * s] tokens.

    None chooses every valid token.
    """
    length = batch.tokens_bs.shape[1]
    # the first token of each row that counts
    first = [0] * batch.tokens_bs.shape[0]
    if last is not None:
        for row in range(len(first)):
            valid = [t for r, start, end in batch.documents if r == row for t in range(start, end)]
            first[row] = valid[-last] if len(valid) >= last else 0
    places = batch.shard.own_positions().tolist()
    return [
        span.row * length + token
        for span in batch.spans
        for token in range(span.start, span.end)
        if places[token] >= first[span.row]
    ]


def logits_kl_sum(
    teacher: Decoder, student: Decoder, residuals: Residuals, rows: list[int]
) -> torch.Tensor:
    """Σ over the chosen rows of KL(teacher || student), a scalar to differentiate.

    Logits exist for a chunk of rows at a time, forward and backward. A rank without a chosen row
    takes part all the same, since the backward pass of every layer is a collective.
    """
    axis = student.ops.axis
    index = torch.tensor(rows, dtype=torch.int64, device=residuals.student.device)
    hidden_s = student.ops.gather(student.model.norm(residuals.student)).index_select(0, index)
    with torch.no_grad():
        hidden_t = teacher.ops.gather(teacher.model.norm(residuals.teacher)).index_select(0, index)

    def chunk(h_s, h_t, weight_s, weight_t):
        logits_s = F.linear(h_s, weight_s.to(h_s.dtype)).float()
        logits_t = F.linear(h_t, weight_t.to(h_t.dtype)).float()
        return kl_divergence(logits_s, logits_t, axis).sum()

    total = hidden_s.new_zeros((), dtype=torch.float32)
    for h_s, h_t in zip(hidden_s.split(_ROWS), hidden_t.split(_ROWS), strict=True):
        total = total + checkpoint(
            chunk,
            h_s,
            h_t,
            student.head_weight,
            teacher.head_weight,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total
