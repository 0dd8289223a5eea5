"""The tasks: their statements and questions, and two sets of names without a common element."""

from __future__ import annotations

import re

import numpy as np
import pytest

from megalard.evaluation.tasks import ADJECTIVES, NOUNS, TASKS, TASKS_WITH_DEPTH, Draw


def draw(for_samples: bool = True, seed: int = 0) -> Draw:
    """Return a source of names."""
    return Draw(np.random.default_rng(seed), for_samples, set())


def test_the_words_are_distinct():
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("number", r"[1-9]\d{4}"), ("key", r"[a-z]+ [a-z]+"), ("variable", "[A-Z]{5}")],
)
def test_names_of_samples_and_documents_are_disjoint(kind, pattern):
    """And each name is drawn at most once."""
    sets = []
    for for_samples in (True, False):
        source = draw(for_samples)
        names = [getattr(source, kind)() for _ in range(300)]
        assert len(set(names)) == 300 and all(re.fullmatch(pattern, name) for name in names)
        sets.append(set(names))
    assert not sets[0] & sets[1]


def test_the_statement_that_is_asked_for_is_at_the_given_depth():
    assert set(TASKS_WITH_DEPTH) == {"passkey", "multi_key"}
    for task in TASKS_WITH_DEPTH:
        story = TASKS[task](draw(), 0.3)
        (depth, statement), *_ = story.statements
        assert depth == 0.3
        assert story.questions[0][1].strip() in statement


@pytest.mark.parametrize(
    ("task", "statements", "questions"),
    [("passkey", 1, 1), ("multi_key", 4, 4), ("multi_value", 4, 1), ("variable_tracking", 6, 2)],
)
def test_a_task_has_these_statements_and_questions(task, statements, questions):
    story = TASKS[task](draw(), 0.5)
    assert (len(story.statements), len(story.questions)) == (statements, questions)
    assert all(line.endswith(".\n") for _, line in story.statements)
    assert story.opening.endswith("\n") and not story.questions[0][0].endswith("\n")
    assert all(answer.startswith(" ") for _, answer in story.questions)
    assert all(0 <= depth <= 1 for depth, _ in story.statements)


@pytest.mark.parametrize("task", ["multi_value", "variable_tracking"])
def test_answers_in_order_are_in_the_order_of_their_depths(task):
    for seed in range(20):
        story = TASKS[task](draw(seed=seed), 0.5)
        lines = [line for _, line in sorted(story.statements)]
        for _, answer in story.questions:
            names = answer.strip().split(", ")
            places = [
                next(
                    i for i, line in enumerate(lines) if re.search(rf"(: |VAR ){name}( =|\.)", line)
                )
                for name in names
            ]
            assert places == sorted(places)
