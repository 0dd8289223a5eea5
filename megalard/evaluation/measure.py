"""Perplexity by context length, and agreement with the teacher, under any parallel layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
from megalard.parallel.tensor.vocab import arg_max, cross_entropy, kl_divergence

_ROWS = 1024
_TOKENS_A_PASS = 16384


@dataclass(frozen=True)
class Measurement:
    """Means over the predicted tokens of all windows of one length (nats).

    ``kl`` is KL(teacher || model) and ``agreement`` the share of tokens on which both put the same
    token first; None for lengths beyond the teacher's window. ``accuracy`` is the share on which
    the model puts the right token first; None in files of versions that did not measure it.
    """

    loss: float
    kl: float | None = None
    agreement: float | None = None
    accuracy: float | None = None

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
    return cut_windows(store.read(0, available), lengths, max_tokens)


def cut_windows(
    tokens: np.ndarray, lengths: Sequence[int], max_tokens: int
) -> dict[int, np.ndarray]:
    """The same tokens cut into windows of each length: int64 [windows, length].

    A length that does not divide the longest reads up to one window less.

    Args:
        max_tokens: how many to read at most, but always one window of the longest length.

    Raises:
        UserError: there are fewer tokens than the longest length.
    """
    longest = max(lengths)
    if len(tokens) < longest:
        raise UserError(
            f"the text has {len(tokens)} tokens but the longest length is {longest}: give more "
            "text or shorter lengths"
        )
    tokens = tokens[: min(len(tokens), max(max_tokens, longest)) // longest * longest]
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
    advance: Callable[[int], object] = lambda tokens: None,
) -> Measurement:
    """Measure one model on windows of one length; a collective call of all ranks.

    Args:
        windows_wl: int64 [windows, length]; each dp rank takes its share.
        teacher: compared with where given.
        advance: called with the tokens of each pass of this rank, for a progress bar.
    """
    edges = [1, windows_wl.shape[1]]
    return measure_by_position(model, windows_wl, edges, mesh, dtype, teacher, advance)[0]


@torch.no_grad()
def measure_by_position(
    model: Decoder,
    windows_wl: np.ndarray,
    edges: Sequence[int],
    mesh: Mesh,
    dtype: torch.dtype,
    teacher: Decoder | None = None,
    advance: Callable[[int], object] = lambda tokens: None,
) -> tuple[Measurement, list[Measurement]]:
    """As ``measure``, and apart for each interval of positions, in the same passes.

    A token's position is the number of tokens that stand before it in its window, so that the
    positions of a window of n tokens are 1 to n - 1.

    Args:
        edges: rising, from 1 to the windows' length; interval i is ``edges[i] : edges[i + 1]``.

    Returns:
        The means over all tokens, and those over the tokens of each interval.
    """
    length = windows_wl.shape[1]
    assert edges[0] == 1 and edges[-1] == length and list(edges) == sorted(set(edges))
    inner = torch.tensor(edges[1:-1], dtype=torch.int64, device=mesh.device)
    sums = torch.zeros(len(edges) - 1, 5, dtype=torch.float64, device=mesh.device)
    # every dp rank makes its own passes; within one, the cp and tp ranks act together
    for rows in passes(len(windows_wl), length, mesh):
        blocks = [(window, [(0, length)]) for window in windows_wl[rows]]
        batch = collate(blocks).cut(mesh.cp).to(mesh.device)
        sums += _window_sums(model, teacher, batch, inner, dtype)
        advance(len(blocks) * length)
    all_reduce(sums, mesh.data)
    whole, *apart = (_means(row, teacher) for row in (sums.sum(0), *sums))
    return whole, apart


def passes(count: int, length: int, mesh: Mesh) -> Iterator[list[int]]:
    """The rows of ``count`` that this dp rank reads, a few at a time where they are short."""
    own, batch = list(range(mesh.dp.rank, count, mesh.dp.size)), max(1, _TOKENS_A_PASS // length)
    for start in range(0, len(own), batch):
        yield own[start : start + batch]


def _means(sums: torch.Tensor, teacher: Decoder | None) -> Measurement:
    loss, kl, same, right, count = sums.tolist()
    if teacher is None:
        return Measurement(loss / count, accuracy=right / count)
    return Measurement(loss / count, kl / count, same / count, right / count)


def normed_hidden(
    decoder: Decoder, batch: Batch, place: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What the head reads, for some of this rank's tokens: [len(place), hidden].

    Args:
        batch: this rank's share, of ``b * s`` tokens.
        place: int64, indices of its flattened tokens; the same on all tp ranks.
    """
    x = decoder.ops.gather(decoder.model.norm(decoder(batch, dtype)))
    return x.index_select(0, place)


def _window_sums(
    model: Decoder,
    teacher: Decoder | None,
    batch: Batch,
    inner_edges: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[intervals, 5]: loss, kl, agreements, right, tokens, over this rank's tokens of a pass."""
    axis, first = model.ops.axis, model.first_vocab_row
    target = batch.target_bs.flatten()
    place = (target >= 0).nonzero()[:, 0]
    target = target.index_select(0, place)
    position = (batch.place_s + 1).expand_as(batch.target_bs).flatten().index_select(0, place)
    interval = torch.bucketize(position, inner_edges, right=True)
    h = normed_hidden(model, batch, place, dtype)
    h_t = normed_hidden(teacher, batch, place, dtype) if teacher is not None else None
    sums = torch.zeros(len(inner_edges) + 1, 5, dtype=torch.float64, device=target.device)
    # the logits of a few rows at a time: those of a long window would not fit
    for start in range(0, len(target), _ROWS):
        rows = slice(start, start + _ROWS)
        logits = F.linear(h[rows], model.head_weight.to(dtype)).float()
        chosen = arg_max(logits, first, axis)
        found = sums.new_zeros(len(logits), 5)
        found[:, 0] = cross_entropy(logits, target[rows], first, axis)
        found[:, 3] = chosen == target[rows]
        found[:, 4] = 1
        if h_t is not None:
            logits_t = F.linear(h_t[rows], teacher.head_weight.to(dtype)).float()
            found[:, 1] = kl_divergence(logits, logits_t, axis)
            found[:, 2] = chosen == arg_max(logits_t, first, axis)
        # a product and not index_add, whose order on a GPU changes from run to run
        sums += F.one_hot(interval[rows], len(sums)).to(found).T @ found
    return sums
