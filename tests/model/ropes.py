"""Teachers, students and the table that transformers computes, for the tests of RoPE."""

from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalard.config.schema import RopeConfig
from megalard.model.rope import RopeTable, rope_table, scaled_config
from megalard.model.spec import ModelSpec, spec_from_config

NATIVE, THETA, DIM = 64, 10000.0, 16
LINEAR = {"rope_type": "linear", "factor": 2.0}


def teacher(native: int = NATIVE, dim: int = DIM, theta: float = THETA, **changes) -> ModelSpec:
    """Return the spec of a teacher with four heads."""
    config = {
        "model_type": "llama",
        "vocab_size": 67,
        "hidden_size": 4 * dim,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": native,
        "rope_theta": theta,
    }
    return spec_from_config(config | changes, "teacher")


def scaled(rope: RopeConfig, spec: ModelSpec | None = None) -> dict:
    """Return the config.json of a student."""
    return scaled_config(spec or teacher(), rope, NATIVE)


def table_of(config: dict) -> RopeTable:
    """Return the table of a config.json."""
    return rope_table(spec_from_config(config, "student"))


def cos_of_document(table: RopeTable, length: int) -> torch.Tensor:
    """Return cos [length, rotary_dim] of a document of ``length`` tokens."""
    positions = torch.arange(length)[None]
    cos, _ = table.cos_sin(positions, torch.full_like(positions, length))
    return cos[0, 0]


def transformers_cos(config: dict, length: int) -> torch.Tensor:
    """Return cos [length, head_dim] as transformers computes it for ``length`` tokens."""
    embedding = LlamaRotaryEmbedding(LlamaConfig(**config))
    return embedding(torch.zeros(1), torch.arange(length)[None])[0][0]
