"""Small configurations of the families."""

from __future__ import annotations

from megalard.model.spec import ModelSpec, spec_from_config

BASE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def spec_of(family: str, **changes) -> ModelSpec:
    """Return the spec of a small model of a family."""
    return spec_from_config(BASE | {"model_type": family} | changes, "the/model")


def flags_of(family: str, **changes) -> tuple:
    """Return (qkv_bias, o_bias, mlp_bias, qk_norm, norms) of a small model of a family."""
    spec = spec_of(family, **changes)
    return spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.qk_norm, spec.norms
