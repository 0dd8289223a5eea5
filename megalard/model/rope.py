"""Rotary position embeddings: the teacher's native table and the student's scaled table.

transformers computes both tables from a ``config.json``, so that an exported student has exactly
the frequencies in transformers that it was trained with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megalard.config.schema import RopeConfig
from megalard.errors import UserError
from megalard.files.arrays import read_array
from megalard.files.reading import read_json, read_text
from megalard.model.export_config import export_config
from megalard.model.families import FAMILIES
from megalard.model.fuse import fused_on_gpu
from megalard.model.spec import ModelSpec
from megalard.model.transformers_config import as_transformers_reads
from megalard.quiet import quiet_transformers
from megalard.transfer import to_device

_TABLE_BYTES = 2**20


@dataclass(frozen=True)
class RopeTable:
    """The table of rotary positions of one model.

    Attributes:
        inv_freq: fp32 [rotary_dim / 2], the inverse frequencies.
        attention_scaling: the factor on cos and sin that YaRN and longrope have. The student's Q/Q
            and K/K relations carry its square, which is part of these methods.
        long_inv_freq: fp32 [rotary_dim / 2], the inverse frequencies of documents of more than
            ``original_positions`` tokens; None if they are the same (all types but longrope).
        original_positions: the longest document that ``inv_freq`` is for.
    """

    inv_freq: torch.Tensor
    attention_scaling: float
    long_inv_freq: torch.Tensor | None = None
    original_positions: int = 0

    def cos_sin(
        self, position_bs: torch.Tensor, reach_bs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of positions, each fp32 [b, 1, s, rotary_dim].

        Args:
            position_bs: [b, s].
            reach_bs: [b, s], one more than the largest position in the token's document.
        """
        inv_freq = to_device(self.inv_freq, position_bs.device)
        if self.long_inv_freq is not None:
            is_long = (reach_bs > self.original_positions)[..., None]
            inv_freq = torch.where(
                is_long, to_device(self.long_inv_freq, position_bs.device), inv_freq
            )
        angle = position_bs[..., None].float() * inv_freq
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling

    def same_as(self, other: RopeTable) -> bool:
        """Whether two tables give the same rotations at every position and length."""

        def lists(table: RopeTable) -> list[torch.Tensor]:
            return [table.inv_freq, *([] if table.long_inv_freq is None else [table.long_inv_freq])]

        return (
            self.attention_scaling == other.attention_scaling
            and len(lists(self)) == len(lists(other))
            and all(map(torch.equal, lists(self), lists(other)))
            and (self.long_inv_freq is None or self.original_positions == other.original_positions)
        )


@fused_on_gpu
def apply_rope(x_bhsd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + r/2) of the first r features, in fp32.

    This is the layout of Hugging Face's Llama, where r is head_dim.
    """
    rotary_dim = cos.shape[-1]
    rotary, rest = x_bhsd[..., :rotary_dim], x_bhsd[..., rotary_dim:]
    lower, upper = rotary.chunk(2, dim=-1)
    turned = torch.cat((-upper, lower), dim=-1)
    rotated = (rotary * cos + turned * sin).to(x_bhsd.dtype)
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)


def rope_table(spec: ModelSpec) -> RopeTable:
    """Return the table that the rotary class of transformers builds for a model.

    The classes are not imported, because that takes seconds at the start of a run.

    Raises:
        UserError: transformers cannot build a table from what ``config.json`` says.
    """
    kind = spec.rope["rope_type"]
    if kind == "dynamic":
        raise UserError(
            "rope_type 'dynamic' depends on the length that is read, so there is no fixed table to "
            "distill: give a model with another RoPE"
        )
    long, original = None, spec.rope.get("original_max_position_embeddings") or 0
    try:
        with quiet_transformers():
            config = as_transformers_reads(spec.hf_config, "the model")
            config.head_dim = spec.head_dim
            if kind == "default":
                table = _native_table(spec, config)
            else:
                inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, None)
                table = RopeTable(inv_freq, float(attention_scaling))
            if kind == "longrope":
                long, _ = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=original + 1)
        _check_table(table.inv_freq, spec)
        if long is not None:
            _check_table(long, spec)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        missing = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"config.json describes a RoPE that transformers cannot build, {json.dumps(spec.rope)} "
            f"({missing}): correct it, or download it again"
        ) from None
    if long is not None and not torch.equal(long, table.inv_freq):
        table = replace(table, long_inv_freq=long, original_positions=original)
    return table


def _native_table(spec: ModelSpec, config: PretrainedConfig) -> RopeTable:
    """Return the table without scaling: theta^(-2i / r) for the i-th pair of r rotary features."""
    features = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32)
    theta = config.rope_parameters["rope_theta"]
    return RopeTable(1.0 / theta ** (features / spec.rotary_dim), 1.0)


def _check_table(inv_freq: torch.Tensor, spec: ModelSpec) -> None:
    if not inv_freq.isfinite().all():
        raise ValueError("its frequencies are not finite")
    if 2 * len(inv_freq) != spec.rotary_dim:
        raise ValueError(
            f"it has {len(inv_freq)} frequencies for {spec.rotary_dim} rotary features of a head"
        )


def is_native(spec: ModelSpec) -> bool:
    """Whether a model's RoPE is unscaled, whatever type its config.json names."""
    if spec.rope["rope_type"] == "default":
        return True
    config = as_transformers_reads(spec.hf_config, "the model")
    return rope_table(spec).same_as(_native_table(spec, config))


def window_of(spec: ModelSpec, native_window: int | None = None) -> int:
    """Return the number of positions that a model reads.

    That is ``max_position_embeddings`` or, where this is still the window before scaling, the
    factor of the scaling times that window. Servers take the same product.

    Args:
        spec: the model.
        native_window: the window before scaling, which config.json does not name for type linear.
    """
    factor = spec.rope.get("factor")
    original = spec.rope.get("original_max_position_embeddings")
    if spec.rope["rope_type"] == "linear":
        original = native_window
    if not factor or not original:
        return spec.max_positions
    return max(spec.max_positions, round(factor * original))


def scaled_config(
    spec: ModelSpec, rope: RopeConfig, native_context: int, teacher: ModelSpec | None = None
) -> dict:
    """Return the student's ``config.json``: that of ``spec``, with scaled RoPE in both spellings.

    A teacher's RoPE that is scaled already may be scaled further by the same type.

    Args:
        spec: the model that the student starts from.
        rope: type and factor; the other parameters are derived.
        native_context: M in tokens; the student's window is factor * M.
        teacher: the teacher, if the student starts from another model.

    Raises:
        UserError: the RoPE is already scaled by another type, or in the student alone; the table
            file is wrong, or the family cannot describe this type.
    """
    window = round(rope.factor * native_context)
    if rope.type != "table" and not is_native(spec):
        if teacher is not None and teacher.rope != spec.rope:
            raise UserError(
                f"the student's RoPE is already scaled (rope_type '{spec.rope['rope_type']}'), and "
                "the teacher's is not: keep it with rope.type checkpoint"
            )
        return export_config(spec, _scaled_further(spec, rope), window)
    describable = FAMILIES[spec.family].rope_types
    if describable is not None and rope.type not in ("abf", *describable):
        raise UserError(
            f"rope.type is {rope.type}, which config.json of a {spec.family} model cannot "
            f"describe: use {' or '.join(('abf', *describable))}"
        )
    parameters = _scaled_parameters(spec, rope, native_context)
    return export_config(spec, parameters, window)


def _scaled_further(spec: ModelSpec, rope: RopeConfig) -> dict:
    """Return the description of RoPE for a teacher whose RoPE is scaled already."""
    kind = spec.rope["rope_type"]
    if kind not in ("linear", "yarn", "llama3") or rope.type != kind:
        further = f"rope.type {kind} to scale it further, or " if kind != "longrope" else ""
        raise UserError(
            f"the teacher's RoPE is already scaled (rope_type '{kind}'): use {further}rope.type "
            "table, which gives the student's inverse frequencies explicitly"
        )
    return {**spec.rope, "factor": spec.rope["factor"] * rope.factor}


def _scaled_parameters(spec: ModelSpec, rope: RopeConfig, native_context: int) -> dict:
    theta, factor, dim = spec.rope["rope_theta"], rope.factor, spec.rotary_dim
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
                f"rope.long_factors must be {dim // 2} positive numbers (half of the rotary "
                f"features of a head), got {len(factors)}"
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
            values = np.asarray(read_json(file), dtype=np.float64)
        elif file.suffix == ".npy":
            values = read_array(file).astype(np.float64)
        else:
            text = read_text(file, _TABLE_BYTES)
            values = np.loadtxt(text.splitlines(), dtype=np.float64, ndmin=1)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"cannot read inverse frequencies from {path}: {error}") from None
    if values.shape != (head_dim // 2,):
        raise UserError(
            f"{path} has {values.size} inverse frequencies of shape {values.shape}; the model "
            f"needs {head_dim // 2} (head_dim / 2)"
        )
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise UserError(f"{path}: every inverse frequency must be finite and positive")
    return torch.from_numpy(values)
