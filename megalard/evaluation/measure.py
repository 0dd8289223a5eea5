"""Perplexity by context length, and agreement with the teacher, under any parallel layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from megalard.data.batch import Batch, collate
from megalard.data.token_store import TokenStore
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Mesh
from megalard.parallel.vocab import arg_max, cross_entropy, kl_divergence

_ROWS = 1024
_TOKENS_A_PASS = 8192


@dataclass(frozen=True)
class Measurement:
    """Means over the predicted tokens of all windows of one length (nats).

    ``kl`` is KL(teacher || model) and ``agreement`` the share of tokens on which both put the same
    token first; None for lengths beyond the teacher's window.
    """

    loss: float
    kl: float | None = None
    agreement: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def default_lengths(native_context: int, factor: float) -> list[int]:
    """M/4, M/2, M, 2M, ... and factor * M."""
    lengths = [native_context // 4, native_context // 2]
    length = native_context
    while length <= factor * native_context:
        lengths.append(length)
        length *= 2
    lengths.append(round(factor * native_context))
    return sorted({length for length in lengths if length >= 2})


def choose_windows(
    store: TokenStore, lengths: list[int], max_tokens: int, tp: int, cp: int = 1
) -> dict[int, np.ndarray]:
    """The same tokens cut into windows of each length: int64 [windows, length].

    Raises:
        UserError: the text is shorter than the longest length, or the ranks do not divide one.
    """
    pieces = tp if cp == 1 else 2 * cp * tp
    for length in lengths:
        if length % pieces:
            context = "" if cp == 1 else f" times twice parallel.cp {cp}"
            raise UserError(
                f"evaluation length {length} is not a multiple of parallel.tp {tp}{context}: "
                "choose evaluation.lengths that are"
            )
    longest = max(lengths)
    available = min(len(store.tokens), max(max_tokens, longest))
    if available < longest:
        raise UserError(
            f"the held-out text has {available} tokens but evaluation.lengths asks for {longest}: "
            "give more text or shorter lengths"
        )
    tokens = store.read(0, available // longest * longest)
    return {
        length: tokens[: len(tokens) // length * length].reshape(-1, length) for length in lengths
    }


@torch.no_grad()
def measure(
    model: Decoder,
    windows_wl: np.ndarray,
    mesh: Mesh,
    dtype: torch.dtype,
    teacher: Decoder | None = None,
) -> Measurement:
    """Measure one model on windows of one length; a collective call of all ranks.

    Args:
        windows_wl: int64 [windows, length]; each dp rank takes its share.
        teacher: compared with where given.
    """
    length = windows_wl.shape[1]
    sums = torch.zeros(4, dtype=torch.float64, device=mesh.device)
    batch = max(1, _TOKENS_A_PASS // length)
    # every dp rank makes its own passes; within one, the tp ranks act together
    own = windows_wl[mesh.dp.rank :: mesh.dp.size]
    for start in range(0, len(own), batch):
        blocks = [(window, [(0, length)]) for window in own[start : start + batch]]
        sums += _window_sums(model, teacher, collate(blocks).cut(mesh.cp).to(mesh.device), dtype)
    all_reduce(sums, mesh.data)
    loss, kl, same, count = sums.tolist()
    if teacher is None:
        return Measurement(loss / count)
    return Measurement(loss / count, kl / count, same / count)


def _window_sums(
    model: Decoder, teacher: Decoder | None, batch: Batch, dtype: torch.dtype
) -> torch.Tensor:
    """[loss, kl, agreements, tokens] summed over this rank's tokens of a pass."""
    axis, first = model.ops.axis, model.first_vocab_row
    target = batch.target_bs.flatten()
    place = (target >= 0).nonzero()[:, 0]

    def hidden(decoder: Decoder) -> torch.Tensor:
        x = decoder.ops.gather(decoder.model.norm(decoder(batch, dtype)))
        return x.index_select(0, place)

    target = target.index_select(0, place)
    h = hidden(model)
    h_t = hidden(teacher) if teacher is not None else None
    sums = torch.zeros(4, dtype=torch.float64, device=target.device)
    for start in range(0, len(target), _ROWS):
        rows = slice(start, start + _ROWS)
        logits = F.linear(h[rows], model.head_weight.to(dtype)).float()
        sums[0] += cross_entropy(logits, target[rows], first, axis).double().sum()
        if h_t is not None:
            logits_t = F.linear(h_t[rows], teacher.head_weight.to(dtype)).float()
            sums[1] += kl_divergence(logits, logits_t, axis).double().sum()
            sums[2] += (arg_max(logits, first, axis) == arg_max(logits_t, first, axis)).sum()
    sums[3] = len(target)
    return sums
