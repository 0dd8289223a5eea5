"""Results of an imagined evaluation."""

from __future__ import annotations

from dataclasses import replace

from megalard.evaluation.measure import Measurement
from megalard.evaluation.report import Entry, Restoration
from megalard.evaluation.suite import Results, TaskResult

NATIVE = 64
RESTORATION = Restoration(NATIVE, 2.0)


def entry(name: str, short: float, long: float, tokens: int = 0, **agreement) -> Entry:
    """Return a model whose mean loss is ``short`` up to the native window, and ``long`` beyond."""
    by_length = {
        32: Measurement(short - 0.1, **agreement),
        64: Measurement(short + 0.1, **agreement),
        128: Measurement(long),
    }
    return Entry(name, Results(by_length), tokens, window=128)


def restoration_entries() -> list[Entry]:
    """Return a teacher, a scaled student, and a restored student with 3/4 of the gap."""
    return [
        entry("teacher", 1.0, 5.0),
        entry("scaled", 3.0, 4.0, kl=2.0, agreement=0.25),
        entry("restored", 1.5, 3.0, 4096, kl=0.5, agreement=0.75),
    ]


def comparison_entries() -> list[Entry]:
    """Return two models with losses by position and a retrieval task."""
    entries = [entry("a", 2.0, 2.5, kl=0.25, agreement=0.5), entry("b", 2.2, 2.0)]
    for number, model in enumerate(entries):
        task = TaskResult(0.5, 0.75, 1.25 + number, 10, {0.0: 1.0, 1.0: 0.0})
        model.results = replace(
            model.results,
            edges=[1, 16, 128],
            by_position=[Measurement(3.0 + number), Measurement(1.0 + number)],
            tasks={"passkey": {64: task, 128: task}},
        )
        model.directory, model.kind = f"/models/{model.name}", "huggingface"
    return entries
