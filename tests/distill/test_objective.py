"""The loss of a stream: a weighted sum of its terms, and what it depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalard.config.objective import ObjectiveConfig, RelationWeights
from megalard.config.schema import DataConfig, StreamConfig
from megalard.data.batch import collate
from megalard.distill.objective import StreamObjective, is_reached, reaches_of
from megalard.distill.reach import LayerDepth, Reach
from tests.command_line import user_error
from tests.logits import load
from tests.models import make_model

NO_RELATIONS = RelationWeights(q=0, k=0, v=0)
EVERYTHING = ObjectiveConfig(
    RelationWeights(q=1.0, k=0.5, v=2.0, qk=0.75),
    attention_output=0.6,
    hidden_cosine=0.7,
    logits_kl=0.4,
    logits_positions=3,
    language_modelling=0.3,
)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """A frozen teacher and a trained student of the same shape."""
    folder = tmp_path_factory.mktemp("objective")
    teacher, student = (
        load(make_model("llama", folder / name, seed=seed))
        for name, seed in (("teacher", 0), ("student", 1))
    )
    return teacher, student.requires_grad_()


@pytest.fixture
def batch():
    """A block of two documents and a block with padding: 12 and 7 tokens."""
    tokens = np.random.default_rng(0).integers(0, 67, (2, 12))
    return collate([(tokens[0], [(0, 5), (5, 12)]), (tokens[1], [(2, 9)])])


def make(objective: ObjectiveConfig, student, checkpointing: bool = False) -> StreamObjective:
    stream = StreamConfig(objective, DataConfig(["unused"]))
    return StreamObjective(stream, student, 1, torch.float32, checkpointing)


def test_the_loss_is_the_weighted_sum_of_its_parts(decoders, batch):
    objective = make(EVERYTHING, decoders[1])
    counts = objective.count(batch)
    # Relations, attention output and hidden states count valid tokens, the logits the last three
    # of each block, language modelling the tokens with a next token.
    assert counts.tolist() == [19, 19, 19, 6, 16]
    loss, sums = objective(*decoders, batch, 1 / counts)
    parts = sums[: len(objective.part_names)]
    weights = [1.0, 0.5, 2.0, 0.75, 0.6, 0.7, 0.4, 0.3]
    divisors = [19] * 6 + [6, 16]
    expected = sum(
        w * part / n for w, part, n in zip(weights, parts.tolist(), divisors, strict=True)
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert all(part > 0 for part in parts.tolist()) and not parts.requires_grad


def test_a_term_is_the_same_whatever_the_other_terms_are(decoders, batch):
    everything = make(EVERYTHING, decoders[1])
    _, parts = everything(*decoders, batch, torch.ones(5))
    alone = ObjectiveConfig(NO_RELATIONS, hidden_cosine=0.7)
    _, part = make(alone, decoders[1])(*decoders, batch, torch.ones(1))
    assert part[:1].tolist() == [parts[5].item()]


def test_activation_checkpointing_changes_no_bit(decoders, batch):
    results = []
    for checkpointing in (False, True):
        decoders[1].zero_grad()
        objective = make(EVERYTHING, decoders[1], checkpointing)
        loss, parts = objective(*decoders, batch, torch.ones(5))
        loss.backward()
        results.append([loss, parts, *(p.grad for p in decoders[1].parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_language_modelling_alone_needs_no_teacher(decoders, batch):
    objective = make(ObjectiveConfig(NO_RELATIONS, language_modelling=1.0), decoders[1])
    assert not objective.needs_teacher
    loss, _ = objective(None, decoders[1], batch, torch.ones(1))
    assert torch.equal(loss, objective(*decoders, batch, torch.ones(1))[0])


def test_layers_past_the_reach_are_not_run(decoders, batch, monkeypatch):
    objective = make(ObjectiveConfig(layers=[0]), decoders[1])
    for layer in (*decoders[0].model.layers[1:], *decoders[1].model.layers[1:]):
        monkeypatch.setattr(layer, "qkv", None)
    loss, _ = objective(*decoders, batch, torch.ones(1))
    assert loss.isfinite()


def test_each_active_term_has_a_reach():
    assert reaches_of(EVERYTHING, 3) == [
        Reach(2, LayerDepth.QKV, frozenset("qkv")),
        Reach(2, LayerDepth.ATTENTION),
        Reach(2, LayerDepth.WHOLE, norm=True),
        Reach(2, LayerDepth.WHOLE, norm=True, head=True),
        Reach(2, LayerDepth.WHOLE, norm=True, head=True),
    ]
    assert reaches_of(ObjectiveConfig(NO_RELATIONS), 3) == []
    assert "names layer 3" in user_error(reaches_of, ObjectiveConfig(layers=[3]), 3)


def test_a_parameter_is_reached_if_any_stream_depends_on_it():
    streams = {
        "a": StreamConfig(ObjectiveConfig(RelationWeights(q=1, k=0, v=0), layers=[0])),
        "b": StreamConfig(ObjectiveConfig(RelationWeights(q=0, k=0, v=1), layers=[1])),
    }
    reached = {
        f"{layer}.{kind}"
        for layer in range(3)
        for kind in "qkvo"
        if is_reached(f"model.layers.{layer}.self_attn.{kind}_proj.weight", streams, 3)
    }
    assert reached == {"0.q", "0.k", "0.v", "0.o", "1.v"}
