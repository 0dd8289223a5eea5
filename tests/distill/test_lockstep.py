"""Teacher and student layer by layer: the states of transformers, no deeper than needed."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.data.batch import Batch, collate
from megalard.distill.lockstep import lockstep
from megalard.distill.reach import LayerDepth, Reach
from megalard.model.layers import PreNormLayer
from tests.logits import FP32_TOLERANCE, load, relative_error
from tests.models import make_model

LENGTH, LAYERS = 12, 3
COMPLETE = Reach(LAYERS - 1, LayerDepth.WHOLE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models of one shape."""
    folder = tmp_path_factory.mktemp("lockstep")
    for name, seed in (("teacher", 0), ("student", 1)):
        make_model("llama", folder / name, seed=seed)
    return folder


@pytest.fixture
def decoders(folder):
    """The two models as decoders, the second of which is trained."""
    teacher, student = load(folder / "teacher"), load(folder / "student")
    student.requires_grad_()
    return teacher, student


@pytest.fixture
def batch() -> Batch:
    """Two blocks of one document each; the student reads at other positions."""
    tokens = np.random.default_rng(0).integers(0, 67, (2, LENGTH))
    positions = np.arange(LENGTH) + np.arange(LENGTH) // 6 * 30
    return collate([(row, [(0, LENGTH)]) for row in tokens], student_positions=[positions] * 2)


def run(decoders, batch, reach=COMPLETE, keep=True, checkpointing=False):
    return lockstep(*decoders, batch, torch.float32, reach, keep, checkpointing)


def expected_states(path, batch: Batch, positions: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of all layers, as transformers computes them in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    last = []
    # The last of the hidden states is normed.
    model.model.norm.register_forward_pre_hook(lambda norm, inputs: last.append(inputs[0]))
    with torch.no_grad():
        out = model(
            batch.tokens_bs,
            # Without a mask transformers takes a jump in the positions for another document.
            attention_mask=torch.ones_like(positions),
            position_ids=positions,
            use_cache=False,
            output_hidden_states=True,
        )
    return [*out.hidden_states[1:-1], *last]


def test_each_layer_has_the_states_of_transformers(folder, decoders, batch):
    teacher = expected_states(folder / "teacher", batch, batch.position_bs)
    student = expected_states(folder / "student", batch, batch.student_position_bs)
    pairs = list(run(decoders, batch))
    assert [pair.layer for pair in pairs] == [0, 1, 2]
    for pair, theirs in zip(pairs, zip(teacher, student, strict=True), strict=True):
        for state, expected in zip((pair.teacher, pair.student), theirs, strict=True):
            assert relative_error(state.residual, expected.flatten(0, 1)) < FP32_TOLERANCE
    assert pairs[0].student.qkv.q.shape == (2, 4, LENGTH, 8)
    assert pairs[0].student.attention_output.shape == (2, LENGTH, 4, 8)


@pytest.mark.parametrize(
    ("reach", "calls"),
    [
        (Reach(1, LayerDepth.QKV), {"qkv": 4, "attend": 2, "rest": 2}),
        (Reach(2, LayerDepth.ATTENTION), {"qkv": 6, "attend": 6, "rest": 4}),
        (Reach(0, LayerDepth.WHOLE), {"qkv": 2, "attend": 2, "rest": 2}),
    ],
)
def test_nothing_deeper_than_the_reach_is_computed(reach, calls, decoders, batch, monkeypatch):
    counts = dict.fromkeys(calls, 0)
    for name in calls:
        function = getattr(PreNormLayer, name)

        def counting(self, *arguments, name=name, function=function):
            counts[name] += 1
            return function(self, *arguments)

        monkeypatch.setattr(PreNormLayer, name, counting)
    pairs = list(run(decoders, batch, reach))
    assert counts == calls
    last = pairs[-1]
    assert (last.student.residual is None) == (reach.depth != LayerDepth.WHOLE)
    assert (last.student.attention_output is None) == (reach.depth == LayerDepth.QKV)


def test_attention_outputs_are_kept_only_if_asked_for(decoders, batch):
    for pair in run(decoders, batch, keep=False):
        assert pair.student.attention_output is None and pair.teacher.attention_output is None


def gradients(decoders, batch, checkpointing: bool) -> list[torch.Tensor | None]:
    """Return the gradients of the student for a loss on the states of every layer."""
    student = decoders[1]
    student.zero_grad()
    loss = sum(
        (pair.student.qkv.q - pair.teacher.qkv.q).square().sum() + pair.student.residual.sum()
        for pair in run(decoders, batch, checkpointing=checkpointing)
    )
    loss.backward()
    return [parameter.grad for parameter in student.parameters()]


def test_activation_checkpointing_has_the_same_bits(decoders, batch):
    kept, computed_again = (gradients(decoders, batch, value) for value in (False, True))
    for first, second in zip(kept, computed_again, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)
    assert not any(parameter.grad is not None for parameter in decoders[0].parameters())


def test_the_teacher_s_tensors_are_freed_with_the_pair(decoders, batch):
    references = []
    for pair in run(decoders, batch):
        gc.collect()
        assert all(reference() is None for reference in references)
        references = [weakref.ref(pair.teacher.qkv.q), weakref.ref(pair.teacher.attention_output)]
        assert not pair.teacher.residual.requires_grad
        del pair
    gc.collect()
    assert all(reference() is None for reference in references)


def test_the_student_alone_needs_no_teacher(decoders, batch):
    pairs = list(run((None, decoders[1]), batch))
    assert all(pair.teacher is None for pair in pairs)
    student_output = decoders[1](batch.for_student(), torch.float32)
    assert torch.equal(pairs[-1].student.residual, student_output)


def test_an_embedding_that_both_models_share_is_looked_up_once(decoders, batch, monkeypatch):
    teacher, student = decoders
    student.model.embed_tokens.weight = teacher.model.embed_tokens.weight
    calls, embed = [], type(teacher).embed
    monkeypatch.setattr(type(teacher), "embed", lambda *args: calls.append(1) or embed(*args))
    list(run(decoders, batch))
    assert len(calls) == 1
