"""The ``config.json`` of a model that is written: read alike by transformers 4.57 and 5."""

from __future__ import annotations

from typing import Any

from megalard.model.families import FAMILIES
from megalard.model.spec import ModelSpec

# Keys other than max_position_embeddings from which servers and tools derive the longest text.
LENGTH_KEYS = (
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_target_positions",
    "model_max_length",
    "seq_length",
    "seq_len",
)
# Keys that feed RoPE. They are written anew, so that none is left over from before scaling.
_ROPE_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
# auto_map names code in the directory, which is neither run nor copied.
_DROPPED = ("auto_map",)


def export_config(
    spec: ModelSpec, rope: dict | None = None, window: int | None = None
) -> dict[str, Any]:
    """Return the ``config.json`` that a model is written with.

    RoPE is described in the spellings of transformers 4 and 5: transformers 4.57 silently reads a
    file with only ``rope_parameters`` as native RoPE.

    Args:
        spec: the model, whose other keys are kept.
        rope: the description of its RoPE; None keeps that of ``spec``.
        window: the number of positions that the model reads; None keeps that of ``spec``.
    """
    config = {k: v for k, v in spec.hf_config.items() if k not in (*_ROPE_KEYS, *_DROPPED)}
    parameters = dict(rope if rope is not None else spec.rope)
    if FAMILIES[spec.family].reads("partial_rotary_factor"):
        partial = spec.rope.get("partial_rotary_factor", 1.0)
        parameters["partial_rotary_factor"] = config["partial_rotary_factor"] = partial
    config["rope_parameters"] = parameters
    config["rope_theta"] = parameters["rope_theta"]
    config["rope_scaling"] = _old_spelling(spec, parameters)
    if parameters["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    config["model_type"] = spec.family
    config["head_dim"] = spec.head_dim
    config["tie_word_embeddings"] = spec.tied_embeddings
    if window is not None:
        config["max_position_embeddings"] = window
        # A setting of generate(), which servers read as the longest text.
        if config.get("max_length") == spec.max_positions:
            config["max_length"] = window
        for key in LENGTH_KEYS:
            if type(config.get(key)) is int and config[key] < window:
                config[key] = window
    return config


def _old_spelling(spec: ModelSpec, parameters: dict) -> dict | None:
    """Return ``rope_scaling`` as transformers 4 reads it."""
    if parameters["rope_type"] == "default":
        return None
    if FAMILIES[spec.family].rope_types is not None:
        # transformers 4.57 accepts no other key here, and both versions derive the rest.
        lists = {key: parameters[key] for key in ("short_factor", "long_factor")}
        return {"type": parameters["rope_type"], **lists}
    return {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
