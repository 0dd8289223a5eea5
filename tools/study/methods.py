"""The methods that the study compares: recipe, number of tokens, and learning rates to try."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "launch" / "configs" / "study"
# CPT and LongReD read this many tokens. The other methods are compared after 1/60 of it, and read
# four times that number, to see where they go.
LONG_TOKENS = 15_000_000
SHORT_TOKENS = LONG_TOKENS // 60
_SHORT_TOKENS_READ = 4 * SHORT_TOKENS


@dataclass(frozen=True)
class Method:
    """One way to restore a scaled model.

    Attributes:
        label: its name in tables and plots.
        is_long: whether it reads ``LONG_TOKENS``.
        rates: the learning rates that validation text chooses from.
    """

    label: str
    is_long: bool
    rates: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """The number of training tokens that it reads."""
        return LONG_TOKENS if self.is_long else _SHORT_TOKENS_READ

    @property
    def compared_at(self) -> int:
        """The number of training tokens after which it is compared with others."""
        return LONG_TOKENS if self.is_long else SHORT_TOKENS

    @property
    def search_tokens(self) -> int:
        """The number of training tokens that each learning rate is tried with."""
        return LONG_TOKENS // 4 if self.is_long else SHORT_TOKENS

    def milestones(self) -> list[int]:
        """Return the numbers of tokens after which short text is measured."""
        halvings = (self.tokens >> power for power in range(7))
        return sorted({self.compared_at, *halvings})


_LORA = (3e-4, 1e-3, 3e-3, 1e-2)
_ALL = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
METHODS = {
    "linearard": Method("LinearARD (published)", False, _LORA),
    "linearard-qk": Method("LinearARD + QK", False, _LORA),
    "qk-context": Method("QK + attention output", False, _LORA),
    "logits": Method("logits KL", False, _LORA),
    "linearard-long": Method("LinearARD + long text", False, _LORA),
    "ours": Method("ours", False, (3e-4, 1e-3)),
    "cpt": Method("CPT", True, _ALL),
    "longred": Method("LongReD", True, _ALL),
}


def recipe(method: str) -> Path:
    """Return the recipe of a method."""
    return RECIPES / f"{method}.yaml"
