"""Qwen2 and Qwen2.5 with biases on q, k and v; Qwen3 with a norm of each query and key."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megalard.model.families.family import Family, windows_of

_WINDOW_KEYS = frozenset(
    {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
)


def _qwen2(config: PretrainedConfig) -> dict[str, Any]:
    return {"qkv_bias": True, **windows_of(config)}


def _qwen3(config: PretrainedConfig) -> dict[str, Any]:
    has_bias = bool(config.attention_bias)
    return {"qkv_bias": has_bias, "o_bias": has_bias, "qk_norm": "head", **windows_of(config)}


QWEN2 = Family("qwen2", _qwen2, read=_WINDOW_KEYS)
QWEN3 = Family("qwen3", _qwen3, read=_WINDOW_KEYS | {"attention_bias"})
