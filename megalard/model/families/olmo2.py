"""OLMo 2: norms after attention and MLP, and of q and k over their full width."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megalard.model.families.family import Family


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    has_bias = bool(config.attention_bias)
    return {"qkv_bias": has_bias, "o_bias": has_bias, "qk_norm": "full", "norms": "after"}


OLMO2 = Family("olmo2", _flags, read=frozenset({"attention_bias"}))
