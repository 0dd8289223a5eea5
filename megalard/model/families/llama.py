"""Llama: Llama 1 to 3, and the many models that are saved as Llama."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megalard.model.families.family import Family


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    has_bias = bool(config.attention_bias)
    return {"qkv_bias": has_bias, "o_bias": has_bias, "mlp_bias": bool(config.mlp_bias)}


LLAMA = Family("llama", _flags, read=frozenset({"attention_bias", "mlp_bias"}))
