"""The cross-entropy of the next token, as in pre-training."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalard.config.objective import ObjectiveConfig
from megalard.data.batch import Batch
from megalard.distill.reach import LayerDepth, Reach
from megalard.distill.terms.row_slices import sum_of_row_slices
from megalard.distill.terms.term import Term, TermInputs, TermSum
from megalard.model.decoder import Decoder
from megalard.model.ops import without_padding
from megalard.parallel.ops import tensor_axis
from megalard.parallel.tensor.vocab import cross_entropy


class LanguageModelling(Term):
    """The mean cross-entropy over the tokens that have a next token in their document."""

    def __init__(self, objective: ObjectiveConfig, student: Decoder, kv_replicas: int):
        super().__init__(objective, student, kv_replicas)
        self.weights = {"lm": objective.language_modelling}

    @staticmethod
    def reach_of(objective: ObjectiveConfig, num_layers: int) -> Reach | None:
        if objective.language_modelling == 0:
            return None
        return Reach(num_layers - 1, LayerDepth.WHOLE, norm=True, head=True)

    def count(self, batch: Batch) -> torch.Tensor:
        return (batch.target_bs >= 0).sum()

    def on_output(
        self, student_x: torch.Tensor, teacher_x: torch.Tensor | None, inputs: TermInputs
    ) -> TermSum:
        total = cross_entropy_sum(inputs.student, student_x, inputs.batch.target_bs)
        # Every tp rank has the sum over the full vocabulary and reports its share of it.
        return TermSum.single(total, self.objective.language_modelling, 1.0 / self.axis.size)


def cross_entropy_sum(
    student: Decoder, student_x: torch.Tensor, target_bs: torch.Tensor
) -> torch.Tensor:
    """Return Σ over the tokens with a target of -log p(target), a scalar to differentiate.

    Args:
        student_x: output of the last layer [t/tp, hidden], before the final norm.
        target_bs: int64 [b, s] of this rank's tokens; negative if a token has no target.
    """
    axis, first_id = tensor_axis(student), student.first_vocab_row
    hidden = student.ops.gather(student.final_norm(student_x))
    hidden = without_padding(hidden, target_bs.numel())

    def slice_sum(h, target, weight):
        logits = F.linear(h, weight.to(h.dtype)).float()
        loss = cross_entropy(logits, target.clamp(min=0), first_id, axis)
        return (loss * (target >= 0)).sum()

    return sum_of_row_slices(slice_sum, (hidden, target_bs.flatten()), (student.head_weight,))
