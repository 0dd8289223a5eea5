"""Multiple-choice questions, scored by the likelihood that a model gives to each choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from megalard.data.batch import collate
from megalard.data.tokenizer import Tokenizer
from megalard.evaluation.measure import normed_hidden
from megalard.model.decoder import Decoder
from megalard.parallel.mesh import Mesh
from megalard.parallel.ops import tensor_axis
from megalard.parallel.tensor.vocab import cross_entropy
from tools.study.pretrained.questions import Question

# Choices are read as documents of blocks of this many tokens, and their logits for a few rows at a
# time.
_BLOCK = 8192
_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Row:
    """The tokens of one choice of a question: int64 [n], of which the first ``given`` are given."""

    tokens: np.ndarray
    given: int


def encode(questions: Sequence[Question], tokenizer: Tokenizer) -> list[list[Row]]:
    """Return the rows of each question.

    A choice without a context is scored from its second token on, as a model without a BOS token
    predicts no first token.
    """
    rows = []
    for question in questions:
        pairs = list(zip(question.contexts, question.choices, strict=True))
        contexts = tokenizer.encode_batch([context for context, _ in pairs])
        texts = tokenizer.encode_batch([context + choice for context, choice in pairs])
        rows.append(
            [
                Row(np.asarray(text, dtype=np.int64), max(1, _common(context, text)))
                for context, text in zip(contexts, texts, strict=True)
            ]
        )
    return rows


def _common(context: list[int], text: list[int]) -> int:
    """Return how many tokens of the context the text begins with, but not all of the text."""
    count = 0
    while count < min(len(context), len(text) - 1) and context[count] == text[count]:
        count += 1
    return count


@torch.no_grad()
def log_likelihoods(
    model: Decoder, rows: Sequence[Row], mesh: Mesh, dtype: torch.dtype
) -> np.ndarray:
    """Return the log-likelihood of the tokens of each row that are not given: float64 [rows]."""
    result = np.zeros(len(rows))
    axis, first_id = tensor_axis(model), model.first_vocab_row
    for numbers in _blocks(rows):
        ends = np.cumsum([len(rows[number].tokens) for number in numbers])
        starts = ends - [len(rows[number].tokens) for number in numbers]
        documents = list(zip(starts.tolist(), ends.tolist(), strict=True))
        # The ranks of the axis get equally many tokens: one more document fills the block up.
        size = int(ends[-1])
        padding = np.zeros(-size % axis.size, dtype=np.int64)
        tokens = np.concatenate([*(rows[number].tokens for number in numbers), padding])
        documents += [(size, len(tokens))] if len(padding) else []
        batch = collate([(tokens, documents)])
        batch = batch.to(mesh.device)
        target = batch.target_bs.flatten()
        places = (target >= 0).nonzero()[:, 0]
        hidden = normed_hidden(model, batch, places, dtype)
        losses = torch.zeros(len(tokens), dtype=torch.float64, device=mesh.device)
        for start in range(0, len(places), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            logits = F.linear(hidden[part], model.head_weight.to(dtype)).float()
            # The loss of predicting token i + 1 stands at place i.
            losses[places[part]] = cross_entropy(
                logits, target[places[part]], first_id, axis
            ).double()
        by_place = losses.cpu().numpy()
        for number, start, end in zip(numbers, starts, ends, strict=True):
            result[number] = -by_place[start + rows[number].given - 1 : end - 1].sum()
    return result


def _blocks(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Yield the numbers of the rows that are read together."""
    numbers: list[int] = []
    size = 0
    for number, row in enumerate(rows):
        if numbers and size + len(row.tokens) > _BLOCK:
            yield numbers
            numbers, size = [], 0
        numbers.append(number)
        size += len(row.tokens)
    if numbers:
        yield numbers


def right_answers(
    model: Decoder,
    questions: Sequence[Question],
    rows: Sequence[Sequence[Row]],
    mesh: Mesh,
    dtype: torch.dtype,
) -> list[bool]:
    """Return for each question whether the right choice has the largest likelihood.

    Args:
        rows: as ``encode`` returns them.
    """
    values = log_likelihoods(model, [row for group in rows for row in group], mesh, dtype)
    results, start = [], 0
    for question, group in zip(questions, rows, strict=True):
        scores = values[start : start + len(group)]
        if question.per_byte:
            scores = scores / [len(choice.encode()) for choice in question.choices]
        results.append(int(np.argmax(scores)) == question.answer)
        start += len(group)
    return results
