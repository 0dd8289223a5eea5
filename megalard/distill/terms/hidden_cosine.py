"""The cosine distance of hidden states (LongReD, arXiv 2502.07365, equation 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalard.config.objective import ObjectiveConfig
from megalard.distill.forward_gradient import with_autograd_now
from megalard.distill.lockstep import LayerPair
from megalard.distill.reach import LayerDepth, Reach
from megalard.distill.terms.term import Term, TermInputs, TermSum
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.parallel.collectives import padded_rows


class HiddenCosine(Term):
    """The sum over the compared hidden states of 1 - cosine."""

    def __init__(self, objective: ObjectiveConfig, student: Decoder, kv_replicas: int):
        super().__init__(objective, student, kv_replicas)
        self.weights = {"hidden": objective.hidden_cosine}
        self._states = hidden_states(objective, self.spec.num_layers)
        self.layers = [state - 1 for state in self._states]

    @staticmethod
    def reach_of(objective: ObjectiveConfig, num_layers: int) -> Reach | None:
        if objective.hidden_cosine == 0:
            return None
        state = hidden_states(objective, num_layers)[-1]
        return Reach(state - 1, LayerDepth.WHOLE, norm=state == num_layers)

    def on_layer(self, pair: LayerPair, inputs: TermInputs) -> TermSum | None:
        state = pair.layer + 1
        if state not in self._states:
            return None
        student_x, teacher_x = pair.student.residual, pair.teacher.residual
        if state == self.spec.num_layers:
            student_x = inputs.student.final_norm(student_x)
            with torch.no_grad():
                teacher_x = inputs.teacher.final_norm(teacher_x)
        rows = len(student_x)
        start = self.axis.rank * rows
        valid_t = padded_rows(inputs.valid_bs.flatten(), self.axis)[start : start + rows]
        total = cosine_distance_sum(student_x, teacher_x, valid_t)
        return TermSum.single(total, self.objective.hidden_cosine)


def hidden_states(objective: ObjectiveConfig, num_layers: int) -> list[int]:
    """Return the numbers of the hidden states that are compared, in ascending order.

    State i < num_layers is the output of layer i - 1. State num_layers is the last hidden state,
    after the final norm.

    Raises:
        UserError: two depths are the same state.
    """
    states = sorted(max(1, round(depth * num_layers)) for depth in objective.hidden_depths)
    if len(set(states)) < len(states):
        raise UserError(
            f"objective.hidden_depths {objective.hidden_depths} name a layer twice in a model of "
            f"{num_layers} layers ({', '.join(map(str, states))}, counted from 1): leave one out"
        )
    return states


def cosine_distance_sum(
    student_th: torch.Tensor, teacher_th: torch.Tensor, valid_t: torch.Tensor
) -> torch.Tensor:
    """Return Σ over valid tokens of 1 - cos(student, teacher), in fp32.

    Args:
        student_th, teacher_th: hidden states [t, hidden].
        valid_t: bool [t].
    """

    def loss(x: torch.Tensor) -> torch.Tensor:
        similarity = F.cosine_similarity(x.float(), teacher_th.float(), dim=-1)
        return ((1 - similarity) * valid_t).sum()

    return with_autograd_now(loss, student_th)
