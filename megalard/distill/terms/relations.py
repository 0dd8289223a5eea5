"""The LinearARD loss (arXiv 2604.00004): exact KL between relations of teacher and student.

    loss = mean over layers of  sum_rel w_rel * mean over (valid rows, heads of rel) of KL_i

Each rank sums over its own heads and its own rows. The step sums over ranks and divides by the
number of valid rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch.profiler import record_function

from megalard.config.objective import RELATIONS, ObjectiveConfig
from megalard.distill.forward_gradient import with_forward_gradient
from megalard.distill.lockstep import LayerPair
from megalard.distill.reach import LayerDepth, Reach
from megalard.distill.terms.sharded_relations import Operand, RelationPlan, relation_sums
from megalard.distill.terms.term import Term, TermInputs, TermSum, compared_layers
from megalard.model.decoder import Decoder
from megalard.model.ops import Qkv


class Relations(Term):
    """The weighted relations of the compared layers."""

    is_mean_over_layers = True

    def __init__(self, objective: ObjectiveConfig, student: Decoder, kv_replicas: int):
        super().__init__(objective, student, kv_replicas)
        self.weights = objective.active_relations()
        self.layers = compared_layers(objective, self.spec.num_layers)
        # The mean over layers and heads; K/V heads that several ranks hold count once.
        heads = {"q": self.spec.num_heads}
        kv_heads = self.spec.num_kv_heads * kv_replicas
        self._mean = {
            name: 1.0 / (len(self.layers) * heads.get(RELATIONS[name].rows, kv_heads))
            for name in self.weights
        }
        self._factors = {name: w * self._mean[name] for name, w in self.weights.items()}
        self._operands = sorted({kind for n in self.weights for kind in RELATIONS[n].operands})

    @staticmethod
    def reach_of(objective: ObjectiveConfig, num_layers: int) -> Reach | None:
        relations = objective.active_relations()
        if not relations:
            return None
        operands = frozenset(kind for name in relations for kind in RELATIONS[name].operands)
        return Reach(compared_layers(objective, num_layers)[-1], LayerDepth.QKV, operands)

    def on_layer(self, pair: LayerPair, inputs: TermInputs) -> TermSum | None:
        if pair.layer not in self.layers:
            return None
        with record_function("relations"):
            return self.sums(pair.student.qkv, pair.teacher.qkv, inputs.relation_plan)

    def sums(self, student: Qkv, teacher: Qkv, plan: RelationPlan) -> TermSum:
        """Return the relations of one layer, summed over this rank's rows and heads.

        The parts are the unweighted means over layers and heads, summed over rows.
        """
        operands = {
            kind: Operand(getattr(student, kind), getattr(teacher, kind)) for kind in self._operands
        }

        def compute(with_grad: bool) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
            detached = {
                kind: Operand(operand.student.detach(), operand.teacher)
                for kind, operand in operands.items()
            }
            sums, grads = relation_sums(detached, self._factors, plan, with_grad)
            totals = [self._factors[name] * total for name, total in sums.items()]
            value = torch.stack([reduce(torch.add, totals), *sums.values()])
            return value, [grads[kind] for kind in self._operands] if with_grad else ()

        inputs = (operand.student for operand in operands.values())
        loss, *totals = with_forward_gradient(compute, *inputs).unbind()
        means = [total * mean for total, mean in zip(totals, self._mean.values(), strict=True)]
        return TermSum(loss, torch.stack(means).detach())
