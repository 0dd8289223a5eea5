"""The methods that are compared on a pre-trained model, and the stages that they consist of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parents[3] / "launch" / "configs" / "study" / "pretrained"
# The lengths of blocks of short text in the recipes are for a teacher with this window.
RECIPE_WINDOW = 8192


@dataclass(frozen=True)
class Stage:
    """A recipe for one stage of a run.

    Attributes:
        label: its name in tables.
        rates: the learning rates that validation text chooses from.
    """

    label: str
    rates: tuple[float, ...]


STAGES = {
    "linearard": Stage("LinearARD", (3e-4, 1e-3, 2e-3)),
    "linearard-qk": Stage("LinearARD + QK", (3e-4, 1e-3, 2e-3)),
    "qk-attention": Stage("QK + attention output", (3e-4, 1e-3, 3e-3)),
    "logits": Stage("logits KL", (3e-4, 1e-3, 2e-3)),
    "ours": Stage("ours", (1e-4, 3e-4, 1e-3)),
    "cpt": Stage("CPT", (3e-5, 1e-4, 2e-4)),
    "longred": Stage("LongReD", (3e-5, 1e-4, 2e-4)),
    "mix": Stage("logits KL with CPT", (3e-5, 1e-4, 2e-4)),
}


@dataclass(frozen=True)
class Method:
    """One way to restore a scaled model: one or two stages, each with half of the tokens.

    Attributes:
        name: its name on the command line, such as ``linearard`` or ``linearard+cpt``.
    """

    name: str

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of its stages."""
        return tuple(self.name.split("+"))

    @property
    def label(self) -> str:
        """Its name in tables."""
        return ", then ".join(STAGES[stage].label for stage in self.stages)


METHODS = {
    name: Method(name)
    for name in (
        *STAGES,
        *(f"{first}+cpt" for first in STAGES if first not in ("cpt", "longred", "mix")),
    )
}


def recipe(stage: str) -> Path:
    """Return the recipe of a stage."""
    return RECIPES / f"{stage}.yaml"
