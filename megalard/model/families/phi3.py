"""Phi-3 and Phi-4: one tensor for q, k and v, one for gate and up, and RoPE on part of a head."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megalard.model.families.family import Family


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    return {"windows": (config.sliding_window,) * config.num_hidden_layers}


PHI3 = Family(
    "phi3",
    _flags,
    read=frozenset({"sliding_window", "partial_rotary_factor"}),
    rope_types=("longrope",),
    fused={
        "self_attn.qkv_proj.weight": (
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
        ),
        "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    },
)
