"""Rotary position embeddings: the teacher's native table and the student's scaled table.

transformers computes both tables from a ``config.json``, so that an exported student has exactly
the frequencies in transformers that it was trained with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalard.config.schema import RopeConfig
from megalard.errors import UserError
from megalard.model.fuse import fused_on_gpu
from megalard.model.spec import ModelSpec
from megalard.transfer import to_device


@dataclass(frozen=True)
class RopeTable:
    """The table of rotary positions of one model.

    Attributes:
        inv_freq: fp32 [head_dim / 2], the inverse frequencies.
        attention_scaling: the factor on cos and sin that YaRN and longrope have. The student's Q/Q
            and K/K relations carry its square, which is part of these methods.
    """

    inv_freq: torch.Tensor
    attention_scaling: float

    def cos_sin(self, position_bs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each fp32 [b, 1, s, head_dim], for positions [b, s]."""
        angle = position_bs[..., None].float() * to_device(self.inv_freq, position_bs.device)
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


@fused_on_gpu
def apply_rope(x_bhsd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + d/2), which is the layout of Hugging Face's Llama, in fp32."""
    lower, upper = x_bhsd.chunk(2, dim=-1)
    rotated = torch.cat((-upper, lower), dim=-1)
    return (x_bhsd * cos + rotated * sin).to(x_bhsd.dtype)


def rope_table(spec: ModelSpec) -> RopeTable:
    """Return the table that transformers builds for a model.

    Raises:
        UserError: transformers cannot build a table from what ``config.json`` says.
    """
    if spec.rope["rope_type"] == "dynamic":
        raise UserError(
            "rope_type 'dynamic' depends on the length that is read, so there is no fixed table to "
            "distill: give a model with another RoPE"
        )
    try:
        config = LlamaConfig(
            hidden_size=spec.num_heads * spec.head_dim,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            max_position_embeddings=spec.max_positions,
            rope_parameters=dict(spec.rope),
        )
        embedding = LlamaRotaryEmbedding(config)
        if not embedding.inv_freq.isfinite().all():
            raise ValueError("its frequencies are not finite")
    except (KeyError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        missing = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"config.json describes a RoPE that transformers cannot build, {json.dumps(spec.rope)} "
            f"({missing}): correct it, or download it again"
        ) from None
    return RopeTable(embedding.inv_freq.clone(), float(embedding.attention_scaling))


def scaled_config(spec: ModelSpec, rope: RopeConfig, native_context: int) -> dict:
    """Return the student's ``config.json``: the teacher's, with scaled RoPE in both spellings.

    Args:
        spec: the teacher.
        rope: type and factor; the other parameters are derived.
        native_context: M in tokens; the student's window is factor * M.

    Raises:
        UserError: the teacher's RoPE is already scaled, or the table file is wrong.
    """
    native = spec.rope
    if native["rope_type"] != "default" and rope.type != "table":
        raise UserError(
            f"the teacher's RoPE is already scaled (rope_type '{native['rope_type']}'): give the "
            "student's inverse frequencies explicitly with rope.type table"
        )
    parameters = _scaled_parameters(spec, rope, native_context)
    config = dict(spec.hf_config)
    config["max_position_embeddings"] = round(rope.factor * native_context)
    return write_rope(config, parameters, spec.head_dim)


def write_rope(config: dict, parameters: dict, head_dim: int) -> dict:
    """Return a ``config.json`` that describes RoPE in the spellings of transformers 4 and 5.

    transformers 4.57 silently reads a file with only ``rope_parameters`` as native RoPE.
    """
    config = dict(config)
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    config["rope_parameters"] = dict(parameters)
    config["rope_theta"] = parameters["rope_theta"]
    config["rope_scaling"] = None if parameters["rope_type"] == "default" else scaling
    if parameters["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    config["head_dim"] = head_dim
    return config


def _scaled_parameters(spec: ModelSpec, rope: RopeConfig, native_context: int) -> dict:
    theta, factor, dim = spec.rope["rope_theta"], rope.factor, spec.head_dim
    if rope.type == "abf":
        new_theta = rope.theta or theta * factor ** (dim / (dim - 2))
        return {"rope_type": "default", "rope_theta": new_theta}
    if rope.type == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    original = {"original_max_position_embeddings": native_context}
    if rope.type == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **original}
    if rope.type == "llama3":
        bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **bands, **original}

    if rope.type == "longrope":
        factors = rope.long_factors or [factor] * (dim // 2)
        if len(factors) != dim // 2 or min(factors) <= 0:
            raise UserError(
                f"rope.long_factors must be {dim // 2} positive numbers (head_dim / 2), "
                f"got {len(factors)}"
            )
        extra = {}
    else:
        base = theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        factors = (1.0 / (base * read_table(rope.table, dim))).tolist()
        extra = {"attention_factor": 1.0}
    # transformers uses the short factors for up to M tokens, where the student is trained. Both
    # lists are equal, so that the student has the same frequencies at every length.
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": factor,
        "long_factor": list(factors),
        "short_factor": list(factors),
        **original,
        **extra,
    }


def read_table(path: str, head_dim: int) -> torch.Tensor:
    """Return the inverse frequencies, fp64 [head_dim / 2], of a .json, .npy or .txt file.

    Raises:
        UserError: the file cannot be read, or holds another number of values or bad values.
    """
    file = Path(path)
    try:
        if file.suffix == ".json":
            values = np.asarray(json.loads(file.read_text()), dtype=np.float64)
        elif file.suffix == ".npy":
            values = np.load(file, allow_pickle=False).astype(np.float64)
        else:
            values = np.loadtxt(file, dtype=np.float64, ndmin=1)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read inverse frequencies from {path}: {error}") from None
    if values.shape != (head_dim // 2,):
        raise UserError(
            f"{path} has {values.size} inverse frequencies of shape {values.shape}; the model "
            f"needs {head_dim // 2} (head_dim / 2)"
        )
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise UserError(f"{path}: every inverse frequency must be finite and positive")
    return torch.from_numpy(values)
