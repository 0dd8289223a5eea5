"""Perplexity by length and by position, and agreement with the teacher, on any layout of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from megalard.data.batch import Batch, collate
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Mesh
from megalard.parallel.ops import tensor_axis
from megalard.parallel.tensor.vocab import arg_max, cross_entropy, kl_divergence

_LOGIT_ROWS = 1024
_TOKENS_PER_PASS = 16384
_FIRST_EDGE = 16

Advance = Callable[[int], object]
"""Called with the number of tokens that were just read, for a progress bar."""


def no_advance(tokens: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class Measurement:
    """Means over predicted tokens.

    Attributes:
        loss: cross-entropy in nats.
        kl: KL(teacher || model) in nats; None where there is no teacher to compare with.
        agreement: share of tokens for which teacher and model have the same most likely token.
        accuracy: share of tokens that are the model's most likely token; None in files of versions
            that did not measure it.
    """

    loss: float
    kl: float | None = None
    agreement: float | None = None
    accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss), limited to what a float can hold."""
        return math.exp(min(self.loss, 700.0))


def default_lengths(native_window: int, factor: float) -> list[int]:
    """Return M/4, M/2, M, 2M, ... and factor * M."""
    lengths = [native_window // 4, native_window // 2]
    length = native_window
    while length <= factor * native_window:
        lengths.append(length)
        length *= 2
    lengths.append(round(factor * native_window))
    return sorted({length for length in lengths if length >= 2})


def length_multiple(cp: int) -> int:
    """Return the number that every length must be a multiple of on ``cp`` cp ranks."""
    return 1 if cp == 1 else 2 * cp


def check_lengths(lengths: Sequence[int], cp: int, setting: str) -> None:
    """Refuse lengths that the cp ranks cannot share.

    Args:
        setting: where the lengths are set, for the error message.

    Raises:
        UserError: a length does not divide; the message names it and a length that works.
    """
    multiple = length_multiple(cp)
    for length in lengths:
        if length % multiple:
            raise UserError(
                f"length {length} in {setting} is not a multiple of {multiple}, into which cp {cp} "
                f"cuts it: use {max(multiple, length // multiple * multiple)}"
            )


def cut_windows(
    tokens: np.ndarray, lengths: Sequence[int], max_tokens: int, start: Sequence[int] = ()
) -> dict[int, np.ndarray]:
    """Cut the same tokens into windows of each length: int64 [windows, length].

    The windows of a length that does not divide the longest length leave up to one window unread.

    Args:
        tokens: int64 [n].
        max_tokens: how many tokens to read at most. One window of the longest length is always
            read.
        start: the ids that every window begins with, usually the BOS id or nothing.

    Raises:
        UserError: there are fewer tokens than the longest length.
    """
    longest = max(lengths)
    if len(tokens) < longest:
        raise UserError(
            f"the held-out text has {len(tokens)} tokens but the longest length is {longest}: give "
            "more text or shorter lengths"
        )
    tokens = tokens[: min(len(tokens), max(max_tokens, longest)) // longest * longest]
    if start:
        return {length: _windows_after(tokens, length, np.array(start)) for length in lengths}
    return {
        length: tokens[: len(tokens) // length * length].reshape(-1, length) for length in lengths
    }


def _windows_after(tokens: np.ndarray, length: int, start: np.ndarray) -> np.ndarray:
    """Return consecutive windows that each begin with ``start``: int64 [windows, length].

    If the text itself has these ids at the beginning of a window, they are not inserted again.
    """
    windows, begin, size = [], 0, length - len(start)
    if size < 1:
        raise UserError(
            f"a window of {length} tokens has no room for text after the {len(start)} tokens that "
            "the tokenizer begins with: choose longer lengths"
        )
    while True:
        if np.array_equal(tokens[begin : begin + len(start)], start):
            begin += len(start)
        text = tokens[begin : begin + size]
        if len(text) < size and windows:
            return np.stack(windows)
        # The longest length has room for its first window: it is at most as long as the text.
        windows.append(np.concatenate([start, text]))
        begin += size


def doubling_edges(length: int) -> list[int]:
    """Return 1, 16, 32, 64, ... and ``length``: one interval per octave of positions.

    The first sixteen positions, which have next to no context, are one interval.
    """
    edges, edge = [1], _FIRST_EDGE
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def equal_edges(length: int, count: int) -> list[int]:
    """Return the edges of ``count`` intervals from 1 to ``length``, equal up to rounding."""
    assert 1 <= count < length
    return [1, *(round(length * i / count) for i in range(1, count)), length]


@dataclass(frozen=True)
class RecordedTeacher:
    """What a teacher computed of some windows, with which models are compared without the teacher.

    Attributes:
        hidden: for each pass of this rank over the windows, the inputs of the head at its rows,
            [rows, hidden], in host memory.
        head_weight: this rank's rows of the head, in host memory.
    """

    hidden: list[torch.Tensor]
    head_weight: torch.Tensor


@torch.no_grad()
def measure(
    model: Decoder,
    windows_wl: np.ndarray,
    mesh: Mesh,
    dtype: torch.dtype,
    teacher: Decoder | RecordedTeacher | None = None,
    advance: Advance = no_advance,
) -> Measurement:
    """Measure one model on windows of one length; a collective call of all ranks.

    Args:
        windows_wl: int64 [windows, length]; each dp rank takes its share.
        teacher: the model to compare with, if any, or what it recorded of the same windows.
        advance: called after each pass of this rank.
    """
    edges = [1, windows_wl.shape[1]]
    return measure_by_position(model, windows_wl, edges, mesh, dtype, teacher, advance)[0]


def measure_and_record(
    teacher: Decoder,
    windows_wl: np.ndarray,
    mesh: Mesh,
    dtype: torch.dtype,
    head_weight: torch.Tensor,
) -> tuple[Measurement, RecordedTeacher]:
    """Measure a teacher as ``measure`` does, and keep what comparisons with it need.

    Args:
        head_weight: the teacher's head in host memory, which all recordings may share.
    """
    recorded = RecordedTeacher([], head_weight)
    edges = [1, windows_wl.shape[1]]
    overall, _ = measure_by_position(
        teacher, windows_wl, edges, mesh, dtype, record=recorded.hidden.append
    )
    return overall, recorded


@torch.no_grad()
def measure_by_position(
    model: Decoder,
    windows_wl: np.ndarray,
    edges: Sequence[int],
    mesh: Mesh,
    dtype: torch.dtype,
    teacher: Decoder | RecordedTeacher | None = None,
    advance: Advance = no_advance,
    record: Callable[[torch.Tensor], object] | None = None,
) -> tuple[Measurement, list[Measurement]]:
    """Measure one model as ``measure`` does, and for each interval of positions separately.

    The position of a token is the number of tokens before it in its window, so that a window of n
    tokens has the positions 1 to n - 1.

    Args:
        edges: increasing, from 1 to the length of the windows. Interval i is
            ``edges[i] : edges[i + 1]``.
        record: called in each pass with the inputs of the model's head, in host memory.

    Returns:
        The means over all tokens, and the means over the tokens of each interval.
    """
    length = windows_wl.shape[1]
    assert edges[0] == 1 and edges[-1] == length and list(edges) == sorted(set(edges))
    inner_edges = torch.tensor(edges[1:-1], dtype=torch.int64, device=mesh.device)
    sums = torch.zeros(len(edges) - 1, 5, dtype=torch.float64, device=mesh.device)
    # Every dp rank reads its own windows. Within a pass the cp and tp ranks work together.
    for number, windows in enumerate(passes(len(windows_wl), length, mesh)):
        blocks = [(window, [(0, length)]) for window in windows_wl[windows or [0]]]
        batch = collate(blocks).cut(mesh.cp).to(mesh.device)
        rows = ((batch.target_bs.flatten() >= 0) & bool(windows)).nonzero()[:, 0]
        hidden = normed_hidden(model, batch, rows, dtype)
        if record is not None:
            record(hidden.to("cpu"))
        compared = None
        if isinstance(teacher, RecordedTeacher):
            compared = teacher.hidden[number].to(mesh.device), teacher.head_weight.to(mesh.device)
        elif teacher is not None:
            compared = normed_hidden(teacher, batch, rows, dtype), teacher.head_weight.to(dtype)
        sums += _window_sums(model, hidden, compared, batch, rows, inner_edges)
        advance(len(windows) * length)
    all_reduce(sums, mesh.data)
    overall, *intervals = (_means(row, teacher is not None) for row in (sums.sum(0), *sums))
    return overall, intervals


def passes(count: int, length: int, mesh: Mesh) -> Iterator[list[int]]:
    """Yield the rows of each pass of this dp rank; short rows are read several per pass.

    All ranks make equally many passes, because a model may gather weights from all of them. A rank
    that has no row left gets an empty list, and runs the model on any row, which does not count.
    """
    local_rows = list(range(mesh.dp.rank, count, mesh.dp.size))
    batch = max(1, _TOKENS_PER_PASS // length)
    for start in range(0, -(-count // mesh.dp.size), batch):
        yield local_rows[start : start + batch]


def _means(sums: torch.Tensor, is_compared: bool) -> Measurement:
    loss, kl, agreements, correct, count = sums.tolist()
    if not is_compared:
        return Measurement(loss / count, accuracy=correct / count)
    return Measurement(loss / count, kl / count, agreements / count, correct / count)


def normed_hidden(
    decoder: Decoder, batch: Batch, rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the input of the head for some of this rank's tokens: [rows, hidden].

    Args:
        batch: this rank's share, of ``b * s`` tokens.
        rows: int64, indices of the flattened tokens, the same on all tp ranks.
    """
    x = decoder.ops.gather(decoder.final_norm(decoder(batch, dtype)))
    return x.index_select(0, rows)


def _window_sums(
    model: Decoder,
    hidden: torch.Tensor,
    compared: tuple[torch.Tensor, torch.Tensor] | None,
    batch: Batch,
    rows: torch.Tensor,
    inner_edges: torch.Tensor,
) -> torch.Tensor:
    """Return sums over a pass: [intervals, 5] of loss, kl, agreements, correct, tokens.

    Args:
        hidden: the inputs of the model's head at ``rows``.
        compared: the teacher's inputs of its head at the same rows, and its head; None if the model
            is not compared.
    """
    axis, first_id = tensor_axis(model), model.first_vocab_row
    head = model.head_weight.to(hidden.dtype)
    target = batch.target_bs.flatten().index_select(0, rows)
    position = (batch.place_s + 1).expand_as(batch.target_bs).flatten().index_select(0, rows)
    interval = torch.bucketize(position, inner_edges, right=True)
    sums = torch.zeros(len(inner_edges) + 1, 5, dtype=torch.float64, device=target.device)
    # The logits exist for a few rows at a time, because those of a long window would not fit.
    for start in range(0, len(target), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        logits = F.linear(hidden[part], head).float()
        best = arg_max(logits, first_id, axis)
        values = sums.new_zeros(len(logits), 5)
        values[:, 0] = cross_entropy(logits, target[part], first_id, axis)
        values[:, 3] = best == target[part]
        values[:, 4] = 1
        if compared is not None:
            teacher_hidden, teacher_head = compared
            teacher_logits = F.linear(teacher_hidden[part], teacher_head).float()
            values[:, 1] = kl_divergence(logits, teacher_logits, axis)
            values[:, 2] = best == arg_max(teacher_logits, first_id, axis)
        # A matrix product instead of index_add, whose order on a GPU changes from run to run.
        sums += F.one_hot(interval[part], len(sums)).to(values).T @ values
    return sums
