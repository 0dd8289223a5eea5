"""How deep a loss reads into a model, and which parameters it therefore depends on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from megalard.model.names import OPERAND_MODULES, VOCAB_PARALLEL, ParameterName


class LayerDepth(IntEnum):
    """How much of a layer is computed: q, k and v; the attention output too; or all of it."""

    QKV = 0
    ATTENTION = 1
    WHOLE = 2


ALL_OPERANDS = frozenset(OPERAND_MODULES)


@dataclass(frozen=True)
class Reach:
    """The deepest tensors of a model that a term reads. What is deeper need not be computed.

    Attributes:
        layer: the last layer, counted from 0.
        depth: how much of the last layer.
        operands: with depth QKV, which of q, k and v of the last layer.
        norm: whether the final norm is read.
        head: whether the head is read.
    """

    layer: int
    depth: LayerDepth
    operands: frozenset[str] = ALL_OPERANDS
    norm: bool = False
    head: bool = False

    def includes(self, name: str) -> bool:
        """Whether a term with this reach depends on the parameter ``name``."""
        parameter = ParameterName.parse(name)
        if parameter.layer is None:
            if parameter.module in VOCAB_PARALLEL:
                return parameter.module == "embed_tokens" or self.head
            return self.norm
        if parameter.layer != self.layer or self.depth == LayerDepth.WHOLE:
            return parameter.layer <= self.layer
        operands = self.operands if self.depth == LayerDepth.QKV else ALL_OPERANDS
        modules = {module for operand in operands for module in OPERAND_MODULES[operand]}
        return parameter.module in {"input_layernorm", *modules}


def deepest(reaches: list[Reach]) -> Reach:
    """Return the reach for which the most layers, and the most of the last layer, are computed."""
    return max(reaches, key=lambda reach: (reach.layer, reach.depth, reach.norm, reach.head))
