"""What the study compares: each method's recipe, its token budget, the rates tried for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "launch" / "configs" / "study"
NATIVE, FACTOR = 512, 8
ROPES = ("linear", "yarn")
# CPT and LongReD read this many tokens, the others at most 1/60 of it at the mark where they are
# compared, and four times that in all, to see where they go
LONG_TOKENS = 15_000_000
SHORT_TOKENS = LONG_TOKENS // 60
SHORT_TOKENS_IN_ALL = 4 * SHORT_TOKENS


@dataclass(frozen=True)
class Method:
    """One way to restore a scaled model.

    Attributes:
        label: what plots and tables call it.
        long: whether it reads LONG_TOKENS.
        rates: the learning rates it may choose from, on validation text.
    """

    label: str
    long: bool
    rates: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """How many it reads in all."""
        return LONG_TOKENS if self.long else SHORT_TOKENS_IN_ALL

    @property
    def compared_at(self) -> int:
        """The tokens after which methods are compared."""
        return LONG_TOKENS if self.long else SHORT_TOKENS

    @property
    def search_tokens(self) -> int:
        """What a try of a learning rate reads."""
        return LONG_TOKENS // 4 if self.long else SHORT_TOKENS

    def milestones(self) -> list[int]:
        """Tokens after which short text is measured: halvings of the whole."""
        return sorted({self.compared_at, *(self.tokens >> i for i in range(7))})


_LORA = (3e-4, 1e-3, 3e-3, 1e-2)
_ALL = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
METHODS = {
    "linearard": Method("LinearARD (published)", False, _LORA),
    "linearard-qk": Method("LinearARD + QK", False, _LORA),
    "qk-context": Method("QK + attention context", False, _LORA),
    "logits": Method("logits KL", False, _LORA),
    "linearard-long": Method("LinearARD + long text", False, _LORA),
    "ours": Method("ours", False, (3e-4, 1e-3)),
    "cpt": Method("CPT", True, _ALL),
    "longred": Method("LongReD", True, _ALL),
}


def config_file(method: str) -> Path:
    """The recipe of a method."""
    return CONFIGS / f"{method}.yaml"
