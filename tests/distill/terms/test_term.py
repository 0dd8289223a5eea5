"""What all terms have in common: sums, inputs that are computed once, compared layers."""

from __future__ import annotations

import pytest
import torch

from megalard.config.objective import ObjectiveConfig
from megalard.distill.terms import TERMS
from megalard.distill.terms.term import Term, TermInputs, TermSum, compared_layers
from tests.command_line import user_error


def test_a_single_sum_has_a_weighted_loss_and_an_unweighted_part():
    total = torch.tensor(3.0, requires_grad=True)
    result = TermSum.single(total, 0.5, share=0.25)
    assert result.loss.item() == 1.5 and result.loss.requires_grad
    assert result.parts.tolist() == [0.75] and not result.parts.requires_grad


def test_inputs_are_computed_once_for_all_terms(decoders, batch):
    inputs = TermInputs(*decoders, batch)
    assert inputs.relation_plan is inputs.relation_plan and inputs.valid_bs is inputs.valid_bs
    assert inputs.valid_bs.sum() == 19


@pytest.mark.parametrize(("layers", "expected"), [(None, [0, 1, 2]), ([2, 0], [0, 2]), ([1], [1])])
def test_the_compared_layers_are_in_order(layers, expected):
    assert compared_layers(ObjectiveConfig(layers=layers), 3) == expected


def test_a_layer_that_the_model_does_not_have_is_refused():
    assert user_error(compared_layers, ObjectiveConfig(layers=[0, 3]), 3) == (
        "objective.layers names layer 3, but the model has layers 0 to 2: leave it out"
    )


def test_every_term_of_the_configuration_has_a_class(decoders):
    """The names under which terms are reported are part of metrics.jsonl."""
    objective = ObjectiveConfig(
        attention_output=1.0, hidden_cosine=1.0, logits_kl=1.0, language_modelling=1.0
    )
    assert all(issubclass(term, Term) for term in TERMS)
    names = [name for term in TERMS for name in term(objective, decoders[1], 1).weights]
    assert names == ["q", "k", "v", "context", "hidden", "logits", "lm"]
    assert objective.active_terms() == [
        "relations",
        "attention_output",
        "hidden_cosine",
        "logits_kl",
        "language_modelling",
    ]
