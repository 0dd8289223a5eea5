"""The objective: relations, terms, and which of them have a weight."""

from __future__ import annotations

import pytest

from megalard.config.objective import RELATIONS, ObjectiveConfig, Relation
from tests.config.loading import load


def test_relations_compare_rows_with_columns():
    assert {
        "q": Relation("q", "q"),
        "k": Relation("k", "k"),
        "v": Relation("v", "v"),
        "qk": Relation("q", "k"),
    } == RELATIONS
    assert RELATIONS["v"].operands == ("v",) and RELATIONS["qk"].operands == ("q", "k")


def test_only_weighted_relations_and_terms_are_active():
    config = load("--objective.relations.k", "0", "--objective.relations.qk", "0.5")
    assert config.objective.active_relations() == {"q": 1.0, "v": 1.0, "qk": 0.5}
    assert config.objective.active_terms() == ["relations"]
    objective = load("--objective.logits_kl", "1", "--objective.hidden_cosine", "2").objective
    assert objective.active_terms() == ["relations", "hidden_cosine", "logits_kl"]


@pytest.mark.parametrize(
    ("term", "needs_teacher"),
    [
        ("attention_output", True),
        ("hidden_cosine", True),
        ("logits_kl", True),
        ("language_modelling", False),
    ],
)
def test_a_term_that_compares_needs_the_teacher(term, needs_teacher):
    relations = ObjectiveConfig().relations.__class__(q=0.0, k=0.0, v=0.0)
    assert ObjectiveConfig(relations, **{term: 1.0}).needs_teacher == needs_teacher
    assert ObjectiveConfig(**{term: 1.0}).needs_teacher
