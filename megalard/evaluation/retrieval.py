"""Score retrieval samples by teacher forcing, on any layout of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megalard.data.batch import collate
from megalard.evaluation.measure import Advance, no_advance, normed_hidden, passes
from megalard.evaluation.samples import Sample
from megalard.model.decoder import Decoder
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Mesh
from megalard.parallel.ops import tensor_axis
from megalard.parallel.tensor.vocab import arg_max, cross_entropy


@dataclass(frozen=True)
class Score:
    """The score of one sample.

    Attributes:
        exact: whether every token of the answer is the model's most likely token.
        tokens: the share of the answer's tokens that are the model's most likely token.
        loss: the mean cross-entropy over the answer's tokens, in nats.
    """

    exact: bool
    tokens: float
    loss: float


@torch.no_grad()
def score(
    model: Decoder,
    samples: Sequence[Sample],
    mesh: Mesh,
    dtype: torch.dtype,
    advance: Advance = no_advance,
) -> list[Score]:
    """Return the score of every sample, the same on all ranks; a collective call.

    The samples have the same length. The model reads prompt and answer in one pass. Greedy decoding
    would write the answer exactly if, after the prompt and each beginning of the answer, the next
    token of the answer is the most likely one: up to the first wrong token, both have read the same
    tokens. Therefore no token is generated, and logits are computed at the places of the answer
    only.

    Args:
        advance: called after each pass of this rank.
    """
    sums = torch.zeros(len(samples), 2, dtype=torch.float64, device=mesh.device)
    length = len(samples[0].tokens)
    for indices in passes(len(samples), length, mesh):
        chosen = [samples[index] for index in indices or [0]]
        batch = collate([(sample.tokens, [(0, length)]) for sample in chosen])
        batch = batch.cut(mesh.cp).to(mesh.device)
        prompt_length = torch.tensor([len(sample.prompt) for sample in chosen], device=mesh.device)
        # The token at place p predicts the token at place p + 1.
        in_answer = (batch.place_s + 1 >= prompt_length[:, None]) & (batch.target_bs >= 0)
        in_answer &= bool(indices)
        row, _ = in_answer.nonzero(as_tuple=True)
        rows = in_answer.flatten().nonzero()[:, 0]
        target = batch.target_bs.flatten().index_select(0, rows)
        hidden = normed_hidden(model, batch, rows, dtype)
        logits = F.linear(hidden, model.head_weight.to(dtype)).float()
        axis, first_id = tensor_axis(model), model.first_vocab_row
        values = sums.new_zeros(len(rows), 2)
        values[:, 0] = arg_max(logits, first_id, axis) == target
        values[:, 1] = cross_entropy(logits, target, first_id, axis)
        sample_index = torch.tensor(indices, dtype=torch.int64, device=mesh.device)[row]
        sums += F.one_hot(sample_index, len(samples)).to(values).T @ values
        advance(len(indices) * length)
    all_reduce(sums, mesh.data)
    return [
        Score(
            correct == len(sample.answer),
            correct / len(sample.answer),
            loss / len(sample.answer),
        )
        for sample, (correct, loss) in zip(samples, sums.tolist(), strict=True)
    ]
