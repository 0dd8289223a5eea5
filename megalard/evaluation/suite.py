"""What is measured of every model that is compared: the same windows and samples for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from megalard.data.sources import read_documents
from megalard.data.token_store import META, TokenStore
from megalard.data.tokenizer import Tokenizer
from megalard.evaluation.measure import Measurement, measure, measure_by_position
from megalard.evaluation.positions import doubling_edges
from megalard.evaluation.retrieval import Score, score
from megalard.evaluation.tasks import (
    TASKS_WITH_DEPTH,
    Filler,
    Sample,
    TooShort,
    make_sample,
)
from megalard.model.decoder import Decoder
from megalard.parallel.mesh import Mesh

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Suite:
    """The questions put to each model.

    Attributes:
        windows: by length, int64 [windows, length] of text.
        samples: by task and length.
        skipped: (task, length) whose length does not hold the task.
    """

    windows: dict[int, np.ndarray] = field(default_factory=dict)
    samples: dict[str, dict[int, list[Sample]]] = field(default_factory=dict)
    skipped: tuple[tuple[str, int], ...] = ()

    def largest_id(self) -> int:
        """The largest token id in it."""
        tokens = [windows.max() for windows in self.windows.values()]
        tokens += [sample.tokens.max() for sample in self._all_samples()]
        return int(max(tokens))

    def tokens(self, teacher_window: int = 0) -> int:
        """Tokens that one model reads, and the teacher beside it up to its window."""
        read = sum(
            windows.size * (2 if length <= teacher_window else 1)
            for length, windows in self.windows.items()
        )
        return read + sum(len(sample.tokens) for sample in self._all_samples())

    def _all_samples(self) -> Iterable[Sample]:
        return chain.from_iterable(
            samples for by_length in self.samples.values() for samples in by_length.values()
        )


@dataclass(frozen=True)
class TaskResult:
    """A task at one length.

    Attributes:
        exact: share of the samples answered exactly.
        tokens: share of the answers' tokens that are the model's first choice.
        loss: mean over the answers' tokens, in nats; samples weigh the same.
        samples: how many there were.
        by_depth: ``exact`` for each depth; empty where the task has none.
    """

    exact: float
    tokens: float
    loss: float
    samples: int
    by_depth: dict[float, float]


@dataclass(frozen=True)
class Results:
    """One model's.

    Attributes:
        by_length: means over the windows of each length.
        edges, by_position: intervals of positions and the means in them, over the longest windows.
        tasks: by task and length.
    """

    by_length: dict[int, Measurement]
    edges: list[int]
    by_position: list[Measurement]
    tasks: dict[str, dict[int, TaskResult]]


def read_text(
    paths: Sequence[str | Path], tokenizer: Tokenizer, count: int, text_key: str = "text"
) -> np.ndarray:
    """The first tokens of text files, folders or one token store; int64, at most ``count``.

    Every document ends with the tokenizer's end token, as in a token store.

    Raises:
        UserError: as ``megalard.data``; a store was made with another tokenizer.
    """
    if len(paths) == 1 and (Path(paths[0]) / META).is_file():
        store = TokenStore.open(paths[0])
        store.check_tokenizer(tokenizer)
        return store.read(0, min(count, len(store.tokens)))
    rows, found = [], 0
    for document in read_documents(paths, text_key):
        rows.append([*tokenizer.encode_batch([document])[0], tokenizer.eos_id])
        found += len(rows[-1])
        if found >= count:
            break
    return np.fromiter(chain.from_iterable(rows), np.int64, found)[:count]


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
    """Samples of every task, length and depth, ``count`` of each; and what was too short.

    A task without depth gets as many samples as the others.

    Args:
        seed: other seeds give other samples.
        start: see ``make_sample``.
    """
    found, skipped = {}, []
    for task in tasks:
        found[task] = {}
        for length in lengths:
            try:
                found[task][length] = [
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
    return {task: samples for task, samples in found.items() if samples}, tuple(skipped)


def run_suite(
    model: Decoder,
    suite: Suite,
    mesh: Mesh,
    dtype: torch.dtype,
    teacher: Decoder | None = None,
    teacher_window: int = 0,
    edges: Sequence[int] | None = None,
    advance: Advance = lambda tokens: None,
) -> Results:
    """Measure one model; a collective call of all ranks, with the same result on all.

    Args:
        teacher: compared with on windows of up to ``teacher_window`` tokens.
        edges: intervals of positions in the longest windows; ``doubling_edges`` when not given.
        advance: called with the tokens read, over all dp ranks, for a progress bar.
    """
    by_length, by_position, edges = {}, [], list(edges or [])
    longest = max(suite.windows, default=0)
    for length, windows in suite.windows.items():
        beside = teacher if length <= teacher_window else None
        share = mesh.dp.size * (1 if beside is None else 2)

        def step(tokens: int, share: int = share) -> None:
            advance(tokens * share)

        if length == longest:
            edges = edges or doubling_edges(length)
            by_length[length], by_position = measure_by_position(
                model, windows, edges, mesh, dtype, beside, step
            )
        else:
            by_length[length] = measure(model, windows, mesh, dtype, beside, step)
    tasks = {}
    for task, by in suite.samples.items():
        tasks[task] = {}
        for length, samples in by.items():
            scores = score(model, samples, mesh, dtype, lambda n: advance(n * mesh.dp.size))
            tasks[task][length] = summarize(samples, scores)
    return Results(by_length, edges, by_position, tasks)


def summarize(samples: Sequence[Sample], scores: Sequence[Score]) -> TaskResult:
    """Means over the samples of one task and length."""
    depths = sorted({sample.depth for sample in samples if sample.depth is not None})
    pairs = list(zip(samples, scores, strict=True))

    def share(depth: float) -> float:
        return float(np.mean([found.exact for sample, found in pairs if sample.depth == depth]))

    return TaskResult(
        exact=float(np.mean([found.exact for found in scores])),
        tokens=float(np.mean([found.tokens for found in scores])),
        loss=float(np.mean([found.loss for found in scores])),
        samples=len(scores),
        by_depth={depth: share(depth) for depth in depths},
    )
