"""What the student learns: the relations and the other terms of a loss, and their weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megalard.config.fields import allowed_of, section, setting


@dataclass(frozen=True)
class Relation:
    """A relation compares the rows of one operand with the columns of another.

    Attributes:
        rows, columns: the operands, each q, k or v. Everything else follows: the relation has as
            many heads as its rows, and it depends on the projections of both operands.
    """

    rows: str
    columns: str

    @property
    def operands(self) -> tuple[str, ...]:
        """The different operands that the relation reads."""
        return tuple(dict.fromkeys((self.rows, self.columns)))


def _relation(weight: float, rows: str, columns: str) -> float:
    return setting(weight, at_least=0, extra=Relation(rows, columns))


@dataclass(frozen=True)
class RelationWeights:
    """Weight of each relation in the loss. A relation of weight zero is not computed."""

    q: float = _relation(1.0, rows="q", columns="q")
    """Weight of the KL of Q Qᵀ."""
    k: float = _relation(1.0, rows="k", columns="k")
    """Weight of the KL of K Kᵀ."""
    v: float = _relation(1.0, rows="v", columns="v")
    """Weight of the KL of V Vᵀ."""
    qk: float = _relation(0.0, rows="q", columns="k")
    """Weight of the KL of Q Kᵀ, the attention map itself, which q and k alone do not determine. It
    is not part of the published method."""


RELATIONS: dict[str, Relation] = {
    field.name: allowed_of(field).extra for field in dataclasses.fields(RelationWeights)
}


def _term(compares_with_teacher: bool) -> float:
    """Declare the weight of a term of the loss; zero leaves the term out."""
    return setting(0.0, at_least=0, extra=_Term(compares_with_teacher))


@dataclass(frozen=True)
class _Term:
    compares_with_teacher: bool


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student learns: a weighted sum of terms."""

    relations: RelationWeights = section(RelationWeights)
    layers: list[int] | None = setting(None, at_least=0, distinct=True)
    """Layers whose relations and attention outputs are compared, counted from 0; every layer when
    not given."""
    attention_output: float = _term(compares_with_teacher=True)
    """Weight of the squared error of each head's attention output, relative to the squared norm of
    the teacher's."""
    hidden_cosine: float = _term(compares_with_teacher=True)
    """Weight of 1 - cosine between the hidden states at ``hidden_depths``, summed over them."""
    hidden_depths: list[float] = setting([1.0], above=0, at_most=1, distinct=True)
    """Shares of the depth: 0.5 is the output of the middle layer, 1 the last hidden state, after
    the final norm."""
    logits_kl: float = _term(compares_with_teacher=True)
    """Weight of KL(teacher || student) over the vocabulary."""
    logits_temperature: float = setting(1.0, above=0)
    """Both distributions of the KL of the logits are softmax(logits / temperature)."""
    logits_positions: int | None = setting(None, at_least=1)
    """The KL of the logits is taken at the last k positions of a block; at all when not given."""
    language_modelling: float = _term(compares_with_teacher=False)
    """Weight of the cross-entropy of the next token. Alone it needs no teacher, and blocks may be
    as long as the student's window."""

    def active_relations(self) -> dict[str, float]:
        """Return the relations that have a weight, in the order of ``RELATIONS``."""
        weights = {name: getattr(self.relations, name) for name in RELATIONS}
        return {name: weight for name, weight in weights.items() if weight != 0}

    def active_terms(self) -> list[str]:
        """Return the names of the terms that have a weight."""
        names = ["relations"] if self.active_relations() else []
        return names + [
            field.name
            for field in dataclasses.fields(self)
            if isinstance(allowed_of(field).extra, _Term) and getattr(self, field.name) > 0
        ]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares the student with the teacher."""
        fields = {field.name: allowed_of(field).extra for field in dataclasses.fields(self)}
        return any(
            name == "relations" or fields[name].compares_with_teacher
            for name in self.active_terms()
        )
