"""Scoring retrieval samples by teacher forcing, under any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megalard.data.batch import collate
from megalard.evaluation.measure import normed_hidden, passes
from megalard.evaluation.tasks import Sample
from megalard.model.decoder import Decoder
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Mesh
from megalard.parallel.tensor.vocab import arg_max, cross_entropy


@dataclass(frozen=True)
class Score:
    """One sample's.

    Attributes:
        exact: whether every token of the answer is the model's first choice.
        tokens: the share of the answer's tokens that are.
        loss: mean over the answer's tokens, in nats.
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
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[Score]:
    """Score samples of one length; a collective call of all ranks, with one result on all.

    The model reads prompt and answer in one pass. Greedy decoding would write the answer exactly
    when at each of its places, after the prompt and the answer so far, the answer's token is the
    first choice: up to the first wrong token both have read the same. So no token is generated, and
    logits are computed at the answer's places only.

    Args:
        advance: called with the tokens of each pass of this rank, for a progress bar.
    """
    sums = torch.zeros(len(samples), 2, dtype=torch.float64, device=mesh.device)
    length = len(samples[0].tokens)
    for rows in passes(len(samples), length, mesh):
        chosen = [samples[row] for row in rows]
        batch = collate([(sample.tokens, [(0, length)]) for sample in chosen])
        batch = batch.cut(mesh.cp).to(mesh.device)
        first = torch.tensor([len(sample.prompt) for sample in chosen], device=mesh.device)
        # the token at place p chooses that of p + 1
        asked = (batch.place_s + 1 >= first[:, None]) & (batch.target_bs >= 0)
        row, _ = asked.nonzero(as_tuple=True)
        place = asked.flatten().nonzero()[:, 0]
        target = batch.target_bs.flatten().index_select(0, place)
        h = normed_hidden(model, batch, place, dtype)
        logits = F.linear(h, model.head_weight.to(dtype)).float()
        axis, first_row = model.ops.axis, model.first_vocab_row
        found = sums.new_zeros(len(place), 2)
        found[:, 0] = arg_max(logits, first_row, axis) == target
        found[:, 1] = cross_entropy(logits, target, first_row, axis)
        member = F.one_hot(torch.tensor(rows, device=mesh.device)[row], len(samples)).to(found)
        sums += member.T @ found
        advance(len(rows) * length)
    all_reduce(sums, mesh.data)
    return [
        Score(right == len(sample.answer), right / len(sample.answer), loss / len(sample.answer))
        for sample, (right, loss) in zip(samples, sums.tolist(), strict=True)
    ]
