"""Small random models in Hugging Face format, for every family and flag."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

_BASE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

# Phi-3's pad token, which has to be in the vocabulary, and RoPE on half of each head.
_PHI = {"pad_token_id": 0, "partial_rotary_factor": 0.5}

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama-mha": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 7}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 1}),
    "qwen2-windows": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "ministral": (
        MinistralConfig,
        {
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "olmo2": (Olmo2Config, {}),
    "phi3": (Phi3Config, {**_PHI, "sliding_window": 7}),
    "phi3-longrope": (
        Phi3Config,
        {
            **_PHI,
            "original_max_position_embeddings": 16,
            # Half of the 8 features of a head turn: two frequencies.
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [1.2, 4.0],
                "original_max_position_embeddings": 16,
            },
        },
    ),
}


def make_model(family: str, folder: Path, seed: int = 0, **overrides) -> Path:
    """Write a random model whose weights are large enough for every operation to matter."""
    kind, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**{**_BASE, **extra, **overrides}))
    for name, parameter in model.named_parameters():
        center = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, center, 0.2)
    model.save_pretrained(folder)
    return folder


def copy_with_config(source: Path, folder: Path, config: dict) -> Path:
    """Write the weights of a model under another ``config.json``."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def change_config(model: Path, **changes) -> None:
    """Change entries of a model's ``config.json``."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def scale_rope(model: Path) -> None:
    """Scale a model's RoPE by 2."""
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    change_config(model, rope_parameters=rope)
