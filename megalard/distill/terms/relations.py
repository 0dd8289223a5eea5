"""The LinearARD loss (arXiv 2604.00004): exact KL between self-relations of student and teacher.

    loss = mean over layers of  sum_rel w_rel * mean over (valid rows, heads of rel) of KL_i

Each rank sums over its own heads and its own rows; sums over ranks, and the division by the number
of valid rows of the whole step, are the step's.
"""

from __future__ import annotations

import torch

from megalard.distill.terms.sharded_relations import OPERANDS, Operand, RelationPlan, relation_sums
from megalard.distill.terms.states import scaled
from megalard.model.decoder import Qkv
from megalard.model.spec import ModelSpec


class RelationObjective:
    """The weighted relations of one layer, summed over this rank's rows and heads.

    Args:
        spec: the model's head counts.
        weights: relation name (q, k, v, qk) to weight.
        num_layers: how many layers are distilled, to take their mean.
        kv_replicas: tp ranks holding the same K/V heads; each counts its share of their loss.
    """

    def __init__(
        self, spec: ModelSpec, weights: dict[str, float], num_layers: int, kv_replicas: int
    ):
        self.names = list(weights)
        heads = {"q": spec.num_heads, "qk": spec.num_heads}
        # the mean over layers and heads, with replicated heads counted once
        self._mean = {
            name: 1.0 / (num_layers * heads.get(name, spec.num_kv_heads * kv_replicas))
            for name in self.names
        }
        self._factors = {name: weights[name] * self._mean[name] for name in self.names}
        self._operands = sorted({kind for name in self.names for kind in OPERANDS[name]})

    def __call__(
        self, student: Qkv, teacher: Qkv, plan: RelationPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's part of the loss times the number of valid rows.

        Returns:
            The weighted sum, a scalar to differentiate, and [relations] the unweighted means over
            layers and heads (fp32, detached), in the order of ``names``.
        """
        student_x = [getattr(student, kind) for kind in self._operands]
        teacher_x = [getattr(teacher, kind) for kind in self._operands]
        sums = _Relations.apply(self._operands, self._factors, plan, teacher_x, *student_x)
        loss, *parts = sums.unbind()
        means = [part * mean for part, mean in zip(parts, self._mean.values(), strict=True)]
        return loss, torch.stack(means).detach()


class _Relations(torch.autograd.Function):
    """[weighted sum, sum of each relation], differentiable in the first.

    The gradient is computed in the forward pass, so that the teacher's operands can be dropped at
    once and a recomputed layer need not repeat the relation.
    """

    @staticmethod
    def forward(ctx, kinds, factors, plan, teacher, *student):
        operands = {kind: Operand(s, t) for kind, s, t in zip(kinds, student, teacher, strict=True)}
        sums, grads = relation_sums(operands, factors, plan, any(ctx.needs_input_grad))
        ctx.save_for_backward(*(grads[kind] for kind in kinds if grads))
        loss = sum(factors[name] * total for name, total in sums.items())
        return torch.stack([loss, *sums.values()])

    @staticmethod
    def backward(ctx, grad):
        grads = [scaled(saved, grad[0]) for saved in ctx.saved_tensors]
        return None, None, None, None, *grads
