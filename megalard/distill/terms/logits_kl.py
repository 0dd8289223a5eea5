"""KL(teacher || student) of the next token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalard.config.objective import ObjectiveConfig
from megalard.data.batch import Batch
from megalard.distill.reach import LayerDepth, Reach
from megalard.distill.terms.row_slices import sum_of_row_slices
from megalard.distill.terms.term import Term, TermInputs, TermSum
from megalard.model.decoder import Decoder
from megalard.parallel.ops import tensor_axis
from megalard.parallel.tensor.vocab import kl_divergence
from megalard.transfer import to_device


class LogitsKl(Term):
    """The mean over compared tokens of KL(teacher || student) over the vocabulary."""

    def __init__(self, objective: ObjectiveConfig, student: Decoder, kv_replicas: int):
        super().__init__(objective, student, kv_replicas)
        self.weights = {"logits": objective.logits_kl}

    @staticmethod
    def reach_of(objective: ObjectiveConfig, num_layers: int) -> Reach | None:
        if objective.logits_kl == 0:
            return None
        return Reach(num_layers - 1, LayerDepth.WHOLE, norm=True, head=True)

    def count(self, batch: Batch) -> float:
        return float(len(compared_rows(batch, self.objective.logits_positions)))

    def on_output(
        self, student_x: torch.Tensor, teacher_x: torch.Tensor | None, inputs: TermInputs
    ) -> TermSum:
        rows = compared_rows(inputs.batch, self.objective.logits_positions)
        total = logits_kl_sum(
            inputs.teacher,
            inputs.student,
            teacher_x,
            student_x,
            rows,
            self.objective.logits_temperature,
        )
        # Every tp rank has the sum over the full vocabulary and reports its share of it.
        return TermSum.single(total, self.objective.logits_kl, 1.0 / self.axis.size)


def compared_rows(batch: Batch, last: int | None) -> torch.Tensor:
    """Return the last ``last`` valid tokens of each block; every valid token if ``last`` is None.

    Returns:
        Indices into this rank's [b * s] tokens, int64, on the host.
    """
    blocks, length = batch.tokens_bs.shape
    first_place = [0] * blocks  # the first place in each block that is compared
    missing = [batch.shard.length if last is None else last] * blocks
    for row, start, end in sorted(batch.documents, reverse=True):
        if 0 < missing[row] <= end - start:
            first_place[row] = end - missing[row]
        missing[row] -= end - start
    places, rows = batch.shard.local_positions(), [torch.empty(0, dtype=torch.int64)]
    for span in batch.spans:
        tokens = torch.arange(span.start, span.end)
        rows.append(span.row * length + tokens[places[tokens] >= first_place[span.row]])
    return torch.cat(rows)


def logits_kl_sum(
    teacher: Decoder,
    student: Decoder,
    teacher_x: torch.Tensor,
    student_x: torch.Tensor,
    rows: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return Σ over some rows of KL(teacher || student), a scalar to differentiate.

    A rank without a row takes part too, because the backward pass of every layer is a collective.

    Args:
        teacher_x, student_x: outputs of the last layer [t/tp, hidden], before the final norm.
        rows: as ``compared_rows`` returns them.
        temperature: both distributions are softmax(logits / temperature).
    """
    axis = tensor_axis(student)
    index = to_device(rows, student_x.device)
    student_h = student.ops.gather(student.final_norm(student_x)).index_select(0, index)
    with torch.no_grad():
        teacher_h = teacher.ops.gather(teacher.final_norm(teacher_x)).index_select(0, index)

    def slice_sum(h_s, h_t, weight_s, weight_t):
        logits_s = F.linear(h_s, weight_s.to(h_s.dtype)).float()
        logits_t = F.linear(h_t, weight_t.to(h_t.dtype)).float()
        if temperature != 1:
            logits_s, logits_t = logits_s / temperature, logits_t / temperature
        return kl_divergence(logits_s, logits_t, axis).sum()

    weights = student.head_weight, teacher.head_weight
    return sum_of_row_slices(slice_sum, (student_h, teacher_h), weights)
