"""The description of one run of the study: what is trained, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from tools.study.methods import METHODS

# Steps of a timed run; the first ones are left out of the median.
TIMED_STEPS, WARM_UP_STEPS = 15, 5


@dataclass(frozen=True)
class Run:
    """The description of one run.

    Attributes:
        kind: ``search`` tries a learning rate, ``final`` is compared, ``timing`` measures time and
            memory, and ``baseline`` trains nothing.
        method: a name in ``METHODS``; for a baseline ``teacher`` or ``scaled``.
        rope: ``rope.type`` of the student.
        rate: the learning rate.
        seed: the seed of the run.
    """

    kind: str
    method: str
    rope: str
    rate: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        """The name of the run in the file of results."""
        return f"{self.kind}/{self.method}/{self.rope}/{self.rate:g}/{self.seed}"

    @property
    def order(self) -> tuple[int, bool]:
        """A key that sorts runs by seed, and the longest runs of a seed first.

        If time runs out, all methods then lack the same seeds. No long run is left alone at the
        end.
        """
        is_long = self.method in METHODS and METHODS[self.method].is_long
        return self.seed, not is_long

    def tokens(self, shrink: int, tokens_per_step: int) -> int:
        """Return the number of training tokens.

        Args:
            shrink: the divisor of every number of tokens.
        """
        if self.kind == "timing":
            return TIMED_STEPS * tokens_per_step
        method = METHODS.get(self.method)
        if method is None or self.kind == "baseline":
            return 0
        return (method.search_tokens if self.kind == "search" else method.tokens) // shrink
