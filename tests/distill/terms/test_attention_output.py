"""The relative error of attention outputs, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from megalard.config.objective import ObjectiveConfig
from megalard.distill.lockstep import LayerPair, LayerState
from megalard.distill.reach import LayerDepth, Reach
from megalard.distill.terms.attention_output import AttentionOutput, relative_error_sum
from megalard.distill.terms.term import TermInputs


def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention outputs [b, s, H, d] of teacher and student."""
    torch.manual_seed(0)
    return torch.randn(2, 12, 4, 8), torch.randn(2, 12, 4, 8)


def plain(student, teacher, valid):
    """Return Σ ‖s - t‖² / ‖t‖² over valid tokens and heads."""
    error = (student.double() - teacher.double()).norm(dim=-1) ** 2
    return (error / teacher.double().norm(dim=-1) ** 2)[valid].sum()


def test_the_sum_and_its_gradient_are_those_of_the_formula(batch):
    teacher, student = outputs()
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    valid = batch.valid_bs()
    total, expected = relative_error_sum(ours, teacher, valid), plain(theirs, teacher, valid)
    torch.testing.assert_close(total.double(), expected)
    total.backward(), expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_head_whose_teacher_is_zero_is_left_out(batch):
    teacher, student = outputs()
    expected = plain(student, teacher, batch.valid_bs()) - plain(
        student[:1, 3:4, 2:3], teacher[:1, 3:4, 2:3], torch.ones(1, 1, dtype=torch.bool)
    )
    teacher[0, 3, 2] = 0
    leaf = student.clone().requires_grad_()
    total = relative_error_sum(leaf, teacher, batch.valid_bs())
    torch.testing.assert_close(total.double(), expected)
    total.backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[0, 3, 2].any()


def test_the_term_is_the_mean_over_compared_layers_and_heads(decoders, batch):
    teacher, student = decoders
    objective = ObjectiveConfig(attention_output=0.6, layers=[0, 2])
    term, inputs = AttentionOutput(objective, student, 1), TermInputs(teacher, student, batch)
    # The old name, which metrics.jsonl keeps.
    assert term.weights == {"context": 0.6} and term.needs_attention_output
    teacher_out, student_out = outputs()
    pair = [LayerState(None, x, None) for x in (student_out, teacher_out)]
    assert term.on_layer(LayerPair(1, *pair), inputs) is None
    total = term.on_layer(LayerPair(2, *pair), inputs)
    expected = float(plain(student_out, teacher_out, batch.valid_bs())) / (2 * 4)
    assert total.parts.tolist() == pytest.approx([expected], rel=1e-5)
    assert float(total.loss) == pytest.approx(0.6 * expected, rel=1e-5)
    assert term.count(batch) == 19


def test_it_reads_the_attention_of_the_last_compared_layer():
    objective = ObjectiveConfig(attention_output=0.6, layers=[2, 0])
    assert AttentionOutput.reach_of(objective, 5) == Reach(2, LayerDepth.ATTENTION)
    assert AttentionOutput.reach_of(ObjectiveConfig(attention_output=1), 5).layer == 4
    assert AttentionOutput.reach_of(ObjectiveConfig(), 5) is None
