"""Choices are scored as transformers scores them, whatever they are read together with."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.data.tokenizer import Tokenizer
from megalard.parallel.mesh import build_mesh
from tests.logits import load
from tests.models import make_model
from tests.ranks import run_ranks
from tests.small_tokenizers import make_byte_tokenizer
from tools.study.pretrained import choices
from tools.study.pretrained.questions import Question

QUESTIONS = [
    Question(["The sky is", "The sky is"], [" gray", " red"], 0, True),
    Question(["", ""], ["Who left?", "Left who?"], 1, False),
    Question(["One, two,"] * 3, [" three", " four", " seven"], 2, False),
]


def tokenizer() -> Tokenizer:
    return make_byte_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("choices") / "model", vocab_size=257)


@pytest.fixture(scope="module")
def expected(model) -> list[list[float]]:
    """The log-likelihood of every choice, by transformers in float64, one text at a time."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    values = []
    for question in QUESTIONS:
        values.append([])
        for context, choice in zip(question.contexts, question.choices, strict=True):
            ids = torch.tensor([list((context + choice).encode())])
            with torch.no_grad():
                log_p = network(ids).logits[0].log_softmax(-1)
            # Without a context, the first token is given: there is nothing to predict it from.
            given = max(1, len(context.encode()))
            places = torch.arange(given, ids.shape[1])
            values[-1].append(float(log_p[places - 1, ids[0, places]].sum()))
    return values


def score(model: Path) -> list[float]:
    rows = [row for group in choices.encode(QUESTIONS, tokenizer()) for row in group]
    mesh = build_mesh("cpu", 1)
    return choices.log_likelihoods(load(model), rows, mesh, torch.float32).tolist()


# Sums over up to 20 log-probabilities of about 10, in fp32.
TOLERANCE = {"rel": 1e-5, "abs": 1e-4}


@pytest.mark.parametrize("block", [8192, 30, 1])
def test_likelihoods_equal_those_of_transformers(model, expected, block, monkeypatch):
    monkeypatch.setattr(choices, "_BLOCK", block)
    monkeypatch.setattr(choices, "_LOGIT_ROWS", 7)
    assert score(model) == pytest.approx(list(chain(*expected)), **TOLERANCE)


def test_likelihoods_do_not_depend_on_tensor_parallelism(model, expected):
    run_ranks(2, _score_on_two_ranks, model, list(chain(*expected)))


def _score_on_two_ranks(model: Path, expected: list[float]) -> None:
    mesh = build_mesh("cpu", 2)
    rows = [row for group in choices.encode(QUESTIONS, tokenizer()) for row in group]
    values = choices.log_likelihoods(load(model, mesh.tp), rows, mesh, torch.float32)
    assert values.tolist() == pytest.approx(expected, **TOLERANCE)


def test_the_likeliest_choice_counts_and_length_only_where_asked(model, expected):
    mesh = build_mesh("cpu", 1)
    best = []
    for question, values in zip(QUESTIONS, expected, strict=True):
        lengths = [len(c.encode()) if question.per_byte else 1 for c in question.choices]
        best.append(int(np.argmax(np.divide(values, lengths))))
    # Dividing by the length must matter, or the flag is not tested.
    assert best[0] != int(np.argmax(expected[0]))
    rows = choices.encode(QUESTIONS, tokenizer())
    right = choices.right_answers(load(model), QUESTIONS, rows, mesh, torch.float32)
    assert right == [b == q.answer for b, q in zip(best, QUESTIONS, strict=True)]


def test_a_token_that_joins_context_and_choice_belongs_to_the_choice():
    """Two tokenizations that differ from some token on are compared from there."""
    joined = {"a": [1], "ab": [2], "abc": [2, 3]}
    encoder = make_byte_tokenizer()
    object.__setattr__(encoder, "encode_batch", lambda texts: [joined[text] for text in texts])
    [[first, second]] = choices.encode([Question(["a", "ab"], ["b", "c"], 0, False)], encoder)
    assert (first.tokens.tolist(), first.given) == ([2], 1)
    assert (second.tokens.tolist(), second.given) == ([2, 3], 1)
