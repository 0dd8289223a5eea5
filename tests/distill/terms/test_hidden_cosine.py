"""The cosine distance of hidden states, against torch's formula."""

from __future__ import annotations

import pytest
import torch

from megalard.config.objective import ObjectiveConfig
from megalard.distill.lockstep import LayerPair, LayerState
from megalard.distill.reach import LayerDepth, Reach
from megalard.distill.terms.hidden_cosine import HiddenCosine, cosine_distance_sum, hidden_states
from megalard.distill.terms.term import TermInputs
from tests.command_line import user_error


def plain(student, teacher, valid):
    """Return Σ 1 - s·t / (‖s‖ ‖t‖) in float64."""
    s, t = student.double(), teacher.double()
    cosine = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
    return (1 - cosine)[valid].sum()


def test_the_sum_and_its_gradient_are_those_of_the_formula(hidden):
    teacher_x, student_x = hidden
    valid = torch.arange(24) % 3 > 0
    ours, theirs = (student_x.clone().requires_grad_() for _ in range(2))
    total, expected = cosine_distance_sum(ours, teacher_x, valid), plain(theirs, teacher_x, valid)
    torch.testing.assert_close(total.double(), expected)
    total.backward(), expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("depths", "layers", "states"),
    [
        ([1.0], 32, [32]),
        ([0.5, 1.0], 32, [16, 32]),
        ([0.01], 32, [1]),  # at least the output of the first layer
        ([0.34, 0.67], 3, [1, 2]),
        ([1.0, 0.3], 3, [1, 3]),
    ],
)
def test_depths_are_shares_of_the_layers(depths, layers, states):
    objective = ObjectiveConfig(hidden_cosine=1.0, hidden_depths=depths)
    assert hidden_states(objective, layers) == states
    reach = HiddenCosine.reach_of(objective, layers)
    assert reach == Reach(states[-1] - 1, LayerDepth.WHOLE, norm=states[-1] == layers)


def test_depths_that_are_one_layer_are_refused():
    objective = ObjectiveConfig(hidden_cosine=1.0, hidden_depths=[0.9, 1.0])
    assert user_error(hidden_states, objective, 3) == (
        "objective.hidden_depths [0.9, 1.0] name a layer twice in a model of 3 layers "
        "(3, 3, counted from 1): leave one out"
    )


def test_the_last_state_is_compared_after_the_final_norm(decoders, hidden, batch):
    teacher, student = decoders
    objective = ObjectiveConfig(hidden_cosine=2.0, hidden_depths=[0.34, 1.0])
    term, inputs = HiddenCosine(objective, student, 1), TermInputs(teacher, student, batch)
    assert term.weights == {"hidden": 2.0} and term.count(batch) == 19
    teacher_state, student_state = (LayerState(None, None, x) for x in hidden)
    valid = torch.zeros(24, dtype=torch.bool)
    valid[:12] = valid[14:21] = True
    first, second, last = (
        term.on_layer(LayerPair(layer, student_state, teacher_state), inputs) for layer in range(3)
    )
    assert second is None
    expected = float(plain(hidden[1], hidden[0], valid))
    assert first.parts.tolist() == pytest.approx([expected], rel=1e-5)
    normed = plain(student.model.norm(hidden[1]), teacher.model.norm(hidden[0]), valid)
    assert last.parts.tolist() == pytest.approx([float(normed)], rel=1e-5)
    assert float(last.loss) == pytest.approx(2 * float(normed), rel=1e-5)


def test_it_reads_nothing_without_a_weight():
    assert HiddenCosine.reach_of(ObjectiveConfig(), 5) is None
