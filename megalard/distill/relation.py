"""The LinearARD loss (arXiv 2604.00004): exact KL between self-relations of student and teacher.

    loss = mean over layers of  sum_rel w_rel * mean over (valid rows, heads of rel) of KL_i

Each rank sums over its own heads; sums over ranks, and the division by the number of valid rows of
the whole step, are the step's.
"""

from __future__ import annotations

import torch

from megalard.kernels.relation_kl import (
    IntervalMask,
    relation_backward,
    relation_forward,
)
from megalard.model.decoder import Qkv
from megalard.model.spec import ModelSpec


class RelationObjective:
    """The weighted relations of one layer, summed over rows and this rank's heads.

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
        self._weights = weights

    def __call__(
        self, student: Qkv, teacher: Qkv, mask: IntervalMask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's part of the loss times the number of valid rows.

        Returns:
            The weighted sum, a scalar to differentiate, and [relations] the unweighted means over
            layers and heads (fp32, detached), in the order of ``names``.
        """
        parts = []
        for name in self.names:
            if name == "qk":
                rows, columns = (student.q, teacher.q), (student.k, teacher.k)
            else:
                rows, columns = (getattr(student, name), getattr(teacher, name)), (None, None)
            total = _RelationSum.apply(rows[0], columns[0], rows[1], columns[1], mask)
            parts.append(total * self._mean[name])
        loss = sum(w * part for w, part in zip(self._weights.values(), parts, strict=True))
        return loss, torch.stack([part.detach() for part in parts])


class _RelationSum(torch.autograd.Function):
    """Σ over batch, heads and rows of KL_i.

    The gradient is computed in the forward pass, so that the teacher's operands can be dropped at
    once and a recomputed layer need not repeat the relation.
    """

    @staticmethod
    def forward(ctx, rows_s, cols_s, rows_t, cols_t, mask):
        stats = relation_forward(rows_s, rows_t, cols_s, cols_t, mask=mask)
        if any(ctx.needs_input_grad):
            grads = relation_backward(
                rows_s, rows_t, cols_s, cols_t, stats.lse_s, stats.lse_t, None, mask=mask
            )
            ctx.save_for_backward(*(grads if cols_s is not None else (grads,)))
        return stats.kl.sum()

    @staticmethod
    def backward(ctx, grad):
        # in fp32: a scale rounded to half precision would shift every gradient alike
        grads = [(saved.float() * grad).to(saved.dtype) for saved in ctx.saved_tensors]
        return grads[0], grads[1] if len(grads) > 1 else None, None, None, None
