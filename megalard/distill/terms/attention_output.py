"""The error of attention outputs, relative to the teacher's."""

from __future__ import annotations

import torch

from megalard.config.objective import ObjectiveConfig
from megalard.distill.forward_gradient import with_autograd_now
from megalard.distill.lockstep import LayerPair
from megalard.distill.reach import LayerDepth, Reach
from megalard.distill.terms.term import Term, TermInputs, TermSum, compared_layers
from megalard.model.decoder import Decoder

# Squared norms up to this number count as zero.
_SMALLEST = 1e-12


class AttentionOutput(Term):
    """The mean over compared layers and heads of ‖student - teacher‖² / ‖teacher‖²."""

    needs_attention_output = True
    is_mean_over_layers = True

    def __init__(self, objective: ObjectiveConfig, student: Decoder, kv_replicas: int):
        super().__init__(objective, student, kv_replicas)
        self.weights = {"context": objective.attention_output}  # the name in metrics.jsonl
        self.layers = compared_layers(objective, self.spec.num_layers)
        self._mean = 1.0 / (len(self.layers) * self.spec.num_heads)

    @staticmethod
    def reach_of(objective: ObjectiveConfig, num_layers: int) -> Reach | None:
        if objective.attention_output == 0:
            return None
        return Reach(compared_layers(objective, num_layers)[-1], LayerDepth.ATTENTION)

    def on_layer(self, pair: LayerPair, inputs: TermInputs) -> TermSum | None:
        if pair.layer not in self.layers:
            return None
        total = relative_error_sum(
            pair.student.attention_output, pair.teacher.attention_output, inputs.valid_bs
        )
        return TermSum.single(total * self._mean, self.objective.attention_output)


def relative_error_sum(
    student_bshd: torch.Tensor, teacher_bshd: torch.Tensor, valid_bs: torch.Tensor
) -> torch.Tensor:
    """Return Σ over valid tokens and heads of ‖student - teacher‖² / ‖teacher‖², in fp32.

    A head for which the teacher's vector is zero or nearly zero is left out at that token.

    Args:
        student_bshd, teacher_bshd: attention outputs [b, s, H, d].
        valid_bs: bool [b, s].
    """

    def loss(x: torch.Tensor) -> torch.Tensor:
        target = teacher_bshd.float()
        error = (x.float() - target).square().sum(-1)
        size = target.square().sum(-1)
        is_compared = valid_bs[..., None] & (size > _SMALLEST)
        return (error / torch.where(is_compared, size, 1.0) * is_compared).sum()

    return with_autograd_now(loss, student_bshd)
