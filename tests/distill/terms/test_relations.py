"""The relations of one layer, against dense float64 autograd."""

from __future__ import annotations

import math

import pytest
import torch

from megalard.config.objective import ObjectiveConfig, RelationWeights
from megalard.distill.lockstep import LayerPair, LayerState
from megalard.distill.reach import LayerDepth, Reach
from megalard.distill.terms.relations import Relations
from megalard.distill.terms.term import TermInputs
from megalard.model.ops import Qkv
from tests.distill.terms.conftest import DOCUMENTS, LENGTH
from tests.logits import relative_error

WEIGHTS = {"q": 1.0, "k": 0.5, "v": 2.0, "qk": 0.75}
# The rounding of fp32 (6e-8) over sums of some 100 terms, against float64.
TOLERANCE = 5e-6


def vectors(seed: int) -> dict[str, torch.Tensor]:
    """Return q [2, 4, 12, 8], k and v [2, 2, 12, 8]."""
    generator = torch.Generator().manual_seed(seed)
    heads = {"q": 4, "k": 2, "v": 2}
    return {
        kind: torch.randn(2, count, LENGTH, 8, generator=generator) for kind, count in heads.items()
    }


def dense_mean(name: str, student: dict, teacher: dict) -> torch.Tensor:
    """Return the sum over rows of the mean over heads of KL_i, from dense scores."""
    row, column = ("q", "k") if name == "qk" else (name, name)
    allowed = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool)
    for block, documents in enumerate(DOCUMENTS):
        for start, end in documents:
            allowed[block, start:end, start:end] = True
    allowed &= torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()

    def log_softmax(x):
        rows, columns = x[row].double(), x[column].double()
        columns = columns.repeat_interleave(rows.shape[1] // columns.shape[1], dim=1)
        scores = rows @ columns.mT / math.sqrt(8)
        return scores.masked_fill(~allowed[:, None], -1e30).log_softmax(-1)

    log_s, log_t = log_softmax(student), log_softmax(teacher)
    return (log_t.exp() * (log_t - log_s) * allowed[:, None]).sum((0, 2, 3)).mean()


def test_the_sum_and_its_gradients_are_those_of_dense_scores(decoders, batch):
    objective = ObjectiveConfig(RelationWeights(**WEIGHTS), layers=[0, 1])
    term, inputs = Relations(objective, decoders[1], 1), TermInputs(*decoders, batch)
    assert term.weights == WEIGHTS and term.count(batch) == 19
    teacher = vectors(0)
    ours, plain = ({k: x.requires_grad_() for k, x in vectors(1).items()} for _ in range(2))
    states = [LayerState(Qkv(**x), None, None) for x in (ours, teacher)]
    assert term.on_layer(LayerPair(2, *states), inputs) is None
    total = term.on_layer(LayerPair(1, *states), inputs)
    # The mean over the two compared layers.
    means = {name: dense_mean(name, plain, teacher) / 2 for name in WEIGHTS}
    expected = sum(WEIGHTS[name] * mean for name, mean in means.items())
    assert total.parts.tolist() == pytest.approx(
        [float(m.detach()) for m in means.values()], rel=TOLERANCE
    )
    assert float(total.loss.detach()) == pytest.approx(float(expected.detach()), rel=TOLERANCE)
    total.loss.backward(), expected.backward()
    for kind in ours:
        assert relative_error(ours[kind].grad, plain[kind].grad) < TOLERANCE, kind


def test_kv_heads_that_several_ranks_hold_count_once(decoders, batch):
    """With two replicas each rank contributes half of the mean over K/V heads."""
    objective = ObjectiveConfig(RelationWeights(q=1, k=1, v=1))
    states = [LayerState(Qkv(**vectors(seed)), None, None) for seed in (1, 0)]
    inputs = TermInputs(*decoders, batch)
    one, two = (
        Relations(objective, decoders[1], replicas).on_layer(LayerPair(0, *states), inputs).parts
        for replicas in (1, 2)
    )
    torch.testing.assert_close(two, one * torch.tensor([1.0, 0.5, 0.5]))


def test_it_reads_the_operands_of_its_relations_in_the_last_compared_layer():
    def reach_of(layers=None, **weights):
        relations = RelationWeights(**{"q": 0.0, "k": 0.0, "v": 0.0, **weights})
        return Relations.reach_of(ObjectiveConfig(relations, layers), 5)

    assert reach_of(v=1.0) == Reach(4, LayerDepth.QKV, frozenset("v"))
    assert reach_of([1, 3], qk=1.0) == Reach(3, LayerDepth.QKV, frozenset("qk"))
    assert reach_of(q=1.0, v=2.0) == Reach(4, LayerDepth.QKV, frozenset("qv"))
    assert reach_of() is None
