"""Mistral, whose layers all have a sliding window or none, and Ministral, whose layers differ."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megalard.model.families.family import Family, windows_of


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    return {"windows": (config.sliding_window,) * config.num_hidden_layers}


MISTRAL = Family("mistral", _flags, read=frozenset({"sliding_window"}))


def _ministral(config: PretrainedConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        raise ValueError(
            "it has layer_types and no sliding_window, which transformers does not run"
        )
    return windows_of(config)


# transformers also reads a file of model_type mistral as Ministral if it has layer_types.
MINISTRAL = Family("ministral", _ministral, read=frozenset({"sliding_window", "layer_types"}))
