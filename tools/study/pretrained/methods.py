"""The methods that are compared on a pre-trained model, and the stages they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parents[3] / "launch" / "configs" / "study" / "pretrained"
# The lengths of blocks of short text in the recipes are for a teacher with this window.
RECIPE_WINDOW = 8192


@dataclass(frozen=True)
class Phase:
    """A recipe for one stage of a run.

    Attributes:
        label: its name in tables.
        rates: the learning rates that validation text chooses from.
    """

    label: str
    rates: tuple[float, ...]


PHASES = {
    "linearard": Phase("LinearARD", (3e-4, 1e-3, 2e-3)),
    "linearard-qk": Phase("LinearARD + QK", (3e-4, 1e-3, 2e-3)),
    "qk-attention": Phase("QK + attention output", (3e-4, 1e-3, 3e-3)),
    "logits": Phase("logits KL", (3e-4, 1e-3, 2e-3)),
    "ours": Phase("ours", (1e-4, 3e-4, 1e-3)),
    "cpt": Phase("CPT", (3e-5, 1e-4, 2e-4)),
    "longred": Phase("LongReD", (3e-5, 1e-4, 2e-4)),
    "mix": Phase("logits KL with CPT", (3e-5, 1e-4, 2e-4)),
}


@dataclass(frozen=True)
class Method:
    """One way to restore a scaled model: one or two phases, each with half of the tokens.

    Attributes:
        name: its name on the command line, such as ``linearard`` or ``linearard+cpt``.
    """

    name: str

    @property
    def phases(self) -> tuple[str, ...]:
        """The names of its phases."""
        return tuple(self.name.split("+"))

    @property
    def label(self) -> str:
        """Its name in tables."""
        return ", then ".join(PHASES[phase].label for phase in self.phases)


METHODS = {
    name: Method(name)
    for name in (
        *PHASES,
        *(f"{first}+cpt" for first in PHASES if first not in ("cpt", "longred", "mix")),
    )
}


def recipe(phase: str) -> Path:
    """Return the recipe of a phase."""
    return RECIPES / f"{phase}.yaml"
