"""Count the outcomes of a campaign, and print every one that is not as it should be."""

from __future__ import annotations

import collections


class Tally:
    """The outcomes of a campaign.

    Attributes:
        counts: the number of each kind of outcome.
        bad: how many were not as they should be.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.bad = 0

    def add(self, kind: str, is_good: bool, case: str, detail: str = "") -> None:
        """Count an outcome, and print it if it is not good."""
        self.counts[kind] += 1
        if not is_good:
            self.bad += 1
            print(f"{kind}: {case!s}: {detail}".encode("unicode_escape").decode(), flush=True)

    def report(self) -> int:
        """Print the counts; return the exit status."""
        for kind, number in self.counts.most_common():
            print(f"{number:8d} {kind}")
        return 1 if self.bad else 0
