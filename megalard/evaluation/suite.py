"""What is measured of every compared model: the same windows and samples for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from megalard.data.boundaries import Boundaries
from megalard.data.formats import text_column
from megalard.data.sources import read_documents
from megalard.data.token_store import META, TokenStore
from megalard.data.tokenizer import Tokenizer
from megalard.evaluation.measure import (
    Advance,
    Measurement,
    doubling_edges,
    measure,
    measure_by_position,
    no_advance,
)
from megalard.evaluation.retrieval import Score, score
from megalard.evaluation.samples import Filler, Sample, TooShort, make_sample
from megalard.evaluation.tasks import TASKS_WITH_DEPTH
from megalard.model.decoder import Decoder
from megalard.parallel.mesh import Mesh


@dataclass(frozen=True)
class Suite:
    """The text and the questions that are put to each model.

    Attributes:
        windows: length to windows of text, int64 [windows, length].
        samples: task to length to samples.
        skipped: pairs of a task and a length that is too short for it.
    """

    windows: dict[int, np.ndarray] = field(default_factory=dict)
    samples: dict[str, dict[int, list[Sample]]] = field(default_factory=dict)
    skipped: tuple[tuple[str, int], ...] = ()

    def largest_id(self) -> int:
        """Return the largest token id."""
        ids = [windows.max() for windows in self.windows.values()]
        ids += [sample.tokens.max() for sample in self._all_samples()]
        return int(max(ids))

    def tokens(self, teacher_window: int = 0) -> int:
        """Return how many tokens one model reads, plus the teacher's up to its window."""
        text_tokens = sum(
            windows.size * (2 if length <= teacher_window else 1)
            for length, windows in self.windows.items()
        )
        return text_tokens + sum(len(sample.tokens) for sample in self._all_samples())

    def _all_samples(self) -> Iterable[Sample]:
        return chain.from_iterable(
            samples for by_length in self.samples.values() for samples in by_length.values()
        )


@dataclass(frozen=True)
class TaskResult:
    """The result of one task at one length.

    Attributes:
        exact: the share of samples that are answered exactly.
        tokens: the share of the answers' tokens that are the model's most likely token.
        loss: the mean cross-entropy over the answers' tokens, in nats; samples weigh the same.
        samples: the number of samples.
        by_depth: ``exact`` for each depth; empty for a task without depth.
    """

    exact: float
    tokens: float
    loss: float
    samples: int
    by_depth: dict[float, float]


@dataclass(frozen=True)
class Results:
    """The results of one model.

    Attributes:
        by_length: length to the means over all windows of the length.
        edges: the edges of intervals of positions in the longest windows.
        by_position: the means over each of these intervals.
        tasks: task to length to result.
    """

    by_length: dict[int, Measurement]
    edges: list[int] = field(default_factory=list)
    by_position: list[Measurement] = field(default_factory=list)
    tasks: dict[str, dict[int, TaskResult]] = field(default_factory=dict)


def read_text(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    boundaries: Boundaries,
    count: int,
    text_key: str = "text",
) -> np.ndarray:
    """Return at most ``count`` tokens of text files, directories or one token store, int64.

    Documents have special tokens around them, as in a token store.

    Raises:
        UserError: as ``megalard.data``, or a store was made with another tokenizer.
    """
    if len(paths) == 1 and (Path(paths[0]) / META).is_file():
        store = TokenStore.open(paths[0])
        store.check_tokenizer(tokenizer)
        return store.read(0, min(count, len(store.tokens)))
    rows, total = [], 0
    for document in read_documents(paths, text_column(text_key)):
        rows.append(boundaries.around(tokenizer.encode_batch([document])[0]))
        total += len(rows[-1])
        if total >= count:
            break
    return np.fromiter(chain.from_iterable(rows), np.int64, total)[:count]


def make_samples(
    tasks: Sequence[str],
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    filler: Filler,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    count: int = 10,
    seed: int = 0,
    start: Sequence[int] = (),
) -> tuple[dict[str, dict[int, list[Sample]]], tuple[tuple[str, int], ...]]:
    """Make ``count`` samples for every task, length and depth.

    A task without depth gets as many samples as the others.

    Args:
        seed: another seed makes other samples.
        start: as for ``make_sample``.

    Returns:
        Task to length to samples, and the pairs of a task and a length that is too short for it.
    """
    samples: dict[str, dict[int, list[Sample]]] = {}
    skipped = []
    for task in tasks:
        samples[task] = {}
        for length in lengths:
            try:
                samples[task][length] = [
                    make_sample(
                        task,
                        tokenizer,
                        seed * 1_000_003 + number,
                        length,
                        depth if task in TASKS_WITH_DEPTH else 0.0,
                        filler,
                        start,
                    )
                    for place, depth in enumerate(depths)
                    for number in range(place * count, (place + 1) * count)
                ]
            except TooShort:
                skipped.append((task, length))
    return {task: by_length for task, by_length in samples.items() if by_length}, tuple(skipped)


def run_suite(
    model: Decoder,
    suite: Suite,
    mesh: Mesh,
    dtype: torch.dtype,
    teacher: Decoder | None = None,
    teacher_window: int = 0,
    edges: Sequence[int] | None = None,
    advance: Advance = no_advance,
) -> Results:
    """Measure one model; a collective call of all ranks, with the same result on all of them.

    Args:
        teacher: the model to compare with on windows of up to ``teacher_window`` tokens.
        edges: the edges of intervals of positions; None takes ``doubling_edges``.
        advance: called with the number of tokens that all dp ranks have read.
    """
    by_length, by_position, edges = {}, [], list(edges or [])
    longest = max(suite.windows, default=0)
    for length, windows in suite.windows.items():
        compared = teacher if length <= teacher_window else None
        tokens_per_token = mesh.dp.size * (1 if compared is None else 2)

        def step(tokens: int, factor: int = tokens_per_token) -> None:
            advance(tokens * factor)

        if length == longest:
            edges = edges or doubling_edges(length)
            by_length[length], by_position = measure_by_position(
                model, windows, edges, mesh, dtype, compared, step
            )
        else:
            by_length[length] = measure(model, windows, mesh, dtype, compared, step)
    tasks: dict[str, dict[int, TaskResult]] = {}
    for task, samples_by_length in suite.samples.items():
        tasks[task] = {}
        for length, samples in samples_by_length.items():
            scores = score(model, samples, mesh, dtype, lambda n: advance(n * mesh.dp.size))
            tasks[task][length] = summarize(samples, scores)
    return Results(by_length, edges, by_position, tasks)


def summarize(samples: Sequence[Sample], scores: Sequence[Score]) -> TaskResult:
    """Return the means over the samples of one task and length."""
    depths = sorted({sample.depth for sample in samples if sample.depth is not None})
    pairs = list(zip(samples, scores, strict=True))

    def exact_at(depth: float) -> float:
        return float(np.mean([score.exact for sample, score in pairs if sample.depth == depth]))

    return TaskResult(
        exact=float(np.mean([score.exact for score in scores])),
        tokens=float(np.mean([score.tokens for score in scores])),
        loss=float(np.mean([score.loss for score in scores])),
        samples=len(scores),
        by_depth={depth: exact_at(depth) for depth in depths},
    )
