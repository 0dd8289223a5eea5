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
    """The last ``last`` valid tokens of each block, as places (row * s + token); None for all."""
    length = batch.tokens_bs.shape[1]
    rows: list[int] = []
    for row in range(batch.tokens_bs.shape[0]):
        valid = [
            row * length + token
            for owner, start, end in batch.documents
            if owner == row
            for token in range(start, end)
        ]
        rows += valid if last is None else valid[-last:]
    return rows


def logits_kl_sum(
    teacher: Decoder, student: Decoder, residuals: Residuals, rows: list[int]
) -> torch.Tensor:
    """Σ over the chosen rows of KL(teacher || student), a scalar to differentiate.

    Logits exist for a chunk of rows at a time, forward and backward.
    """
    axis = student.ops.axis
    index = torch.tensor(rows, device=residuals.student.device)
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
