"""Outcomes of cases, and their count."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case, or of one part of it.

    Attributes:
        kind: what happened, in a word or two.
        is_good: whether it is as it should be.
        case: what was drawn.
        detail: a sentence or the evidence of a fault.
        is_shown: whether a good outcome is printed as well.
        events: numbers to sum over the cases, such as the kills.
    """

    kind: str
    is_good: bool
    case: str
    detail: str = ""
    is_shown: bool = False
    events: Mapping[str, int] = field(default_factory=dict)


class Tally:
    """The outcomes of a campaign.

    Attributes:
        counts: the number of outcomes of each kind.
        events: the sums of the events of the outcomes.
        bad: the outcomes that are not good, each with its seed.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.events: collections.Counter[str] = collections.Counter()
        self.bad: list[tuple[int, Outcome]] = []

    def add(self, seed: int, outcome: Outcome) -> None:
        """Count an outcome, and print it on one line if it is not good or is to be shown."""
        self.counts[outcome.kind] += 1
        self.events.update(outcome.events)
        if not outcome.is_good:
            self.bad.append((seed, outcome))
        if outcome.is_shown or not outcome.is_good:
            line = f"{outcome.kind}: seed {seed}: {outcome.case}: {outcome.detail}"
            print(line.encode("unicode_escape").decode(), flush=True)

    def report(self) -> int:
        """Print the counts; return the exit status."""
        for name, number in [*self.events.items(), *self.counts.most_common()]:
            print(f"{number:8d} {name}")
        total = sum(self.counts.values())
        print(f"{total:8d} cases, of which {len(self.bad)} are not as they should be")
        return 1 if self.bad else 0

    def write(self, path: Path, facts: Mapping[str, object]) -> None:
        """Write the counts and the outcomes that are not good as JSON, after some facts."""
        bad = [
            {"seed": seed, "kind": outcome.kind, "case": outcome.case, "detail": outcome.detail}
            for seed, outcome in self.bad
        ]
        content = {**facts, "events": self.events, "outcomes": self.counts, "bad": bad}
        path.write_text(json.dumps(content, indent=2) + "\n")
