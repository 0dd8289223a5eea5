"""Names of parameters, as Hugging Face spells them, taken apart in one place."""

from __future__ import annotations

from dataclasses import dataclass

NORMS = ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm", "norm")
QK_NORMS = ("q_norm", "k_norm")
VOCAB_PARALLEL = ("embed_tokens", "lm_head")
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")

# What gradient norms are reported of; see ``kind_of``.
KINDS = ("q", "k", "v", "o", "mlp", "norm", "embedding", "head")

# The modules that each operand of a relation depends on, in its own layer.
OPERAND_MODULES = {
    "q": ("q_proj", "q_norm"),
    "k": ("k_proj", "k_norm"),
    "v": ("v_proj",),
}


@dataclass(frozen=True)
class ParameterName:
    """A name such as ``model.layers.3.self_attn.q_proj.weight``, taken apart.

    Attributes:
        layer: the layer, counted from 0; None for the embedding, the final norm and the head.
        module: the innermost module, such as ``q_proj``.
        kind: ``weight``, ``bias``, ``lora_A`` or ``lora_B``.
    """

    layer: int | None
    module: str
    kind: str

    @classmethod
    def parse(cls, name: str) -> ParameterName:
        parts = name.split(".")
        layer = int(parts[2]) if parts[1:2] == ["layers"] else None
        return cls(layer, parts[-2], parts[-1])


def kind_of(name: str) -> str:
    """Return the kind of a parameter: q, k, v, o, mlp, norm, embedding or head.

    A LoRA pair and a bias are of the kind of their projection.
    """
    module = ParameterName.parse(name).module
    if module in (*NORMS, *QK_NORMS):
        return "norm"
    if module in VOCAB_PARALLEL:
        return "embedding" if module == "embed_tokens" else "head"
    projection = module.removesuffix("_proj")
    return projection if projection in ("q", "k", "v", "o") else "mlp"


def projection_name(layer: int, projection: str) -> str:
    """Return the module name of a projection of attention (q, k, v or o) in a layer."""
    return f"model.layers.{layer}.self_attn.{projection}_proj"
