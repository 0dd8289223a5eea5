"""The shape and flags of a decoder, read from a Hugging Face ``config.json``.

The decoder is driven by these flags, not by the names of model families. A model that the flags do
not describe is refused, with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers import PretrainedConfig

from megalard.errors import UserError, shown
from megalard.files.hints import fix_for_missing_model, fix_for_model_without
from megalard.files.reading import read_json
from megalard.model.families import FAMILIES, reason_to_refuse
from megalard.model.families.family import ACTIVATIONS, REASONS, Family
from megalard.model.transformers_config import as_transformers_reads

SUPPORTED = tuple(FAMILIES)

# The largest accepted value of each size, far beyond any model, so that absurd sizes in a damaged
# file are refused before the weights are opened.
_COUNTS = {
    "vocab_size": 2**28,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "max_position_embeddings": 2**40,
}
_OPTIONAL_COUNTS = {
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "sliding_window": 2**40,
    "max_window_layers": 2**40,
    "original_max_position_embeddings": 2**40,
}
_MAY_BE_ZERO = ("sliding_window", "max_window_layers")
_ROPE_SECTIONS = ("rope_scaling", "rope_parameters")


@dataclass(frozen=True)
class ModelSpec:
    """The shape and flags of a decoder.

    Attributes:
        windows: one entry per layer. None is full causal attention; with w, query i sees key j only
            if i - j < w.
        max_positions: ``max_position_embeddings`` of ``config.json``; see also ``rope.window_of``.
        rope: the description of RoPE in the spelling of transformers 5 (``rope_type``,
            ``rope_theta``, ...).
        hf_config: the content of config.json, for export.
        qkv_bias, o_bias, mlp_bias: which projections have a bias.
        qk_norm: None, or what the norm of queries and keys before RoPE averages over: one
            ``head``, or the ``full`` width of all heads.
        norms: whether a layer has its norms ``before`` attention and MLP or ``after`` them.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    max_positions: int
    rope: dict = field(hash=False)
    hf_config: dict = field(hash=False, repr=False)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    norms: Literal["before", "after"] = "before"

    @property
    def rotary_dim(self) -> int:
        """The number of features of a head that RoPE rotates."""
        return int(self.head_dim * (self.rope.get("partial_rotary_factor") or 1.0))


def read_spec(model_dir: str | Path) -> ModelSpec:
    """Read ``config.json`` of a Hugging Face model directory.

    Raises:
        UserError: the directory or the file is missing, the JSON is invalid, or the decoder would
            compute the model wrongly.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise UserError(f"no model directory at {model_dir}: {fix_for_missing_model(model_dir)}")
    try:
        return spec_from_file(model_dir / "config.json")
    except FileNotFoundError:
        raise UserError(
            f"{model_dir} has no config.json: {fix_for_model_without(model_dir, 'config.json')}"
        ) from None


def spec_from_file(path: Path) -> ModelSpec:
    """Read a ``config.json``, whose directory need not hold a model.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the JSON is invalid, or the decoder would compute the model wrongly.
    """
    try:
        config = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): correct it, or download it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object: give a Hugging Face model directory")
    return spec_from_config(config, str(path.parent))


def spec_from_config(config: dict, where: str) -> ModelSpec:
    """Return the spec of a ``config.json`` dictionary.

    Args:
        config: the content of the file.
        where: the directory of the file, for errors.

    Raises:
        UserError: transformers refuses the file, or the decoder would compute the model wrongly.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        _refuse_family(model_type, where)
    _check_numbers(config, where)
    _check_rope_spellings(config, where)
    read = as_transformers_reads(config, where)
    family = FAMILIES[read.model_type]
    _check_keys(family, read, config, where)
    layers, heads = read.num_hidden_layers, read.num_attention_heads
    rope = {key: value for key, value in read.rope_parameters.items() if key != "type"}
    fields: dict[str, Any] = {
        "family": family.model_type,
        "vocab_size": read.vocab_size,
        "hidden_size": read.hidden_size,
        "intermediate_size": read.intermediate_size,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": read.num_key_value_heads,
        "head_dim": getattr(read, "head_dim", None) or read.hidden_size // heads,
        "norm_eps": read.rms_norm_eps,
        "tied_embeddings": bool(read.tie_word_embeddings),
        "windows": (None,) * layers,
        "max_positions": read.max_position_embeddings,
        "rope": rope,
        "hf_config": config,
    }
    if "rope_type" not in rope:
        _refuse(where, family.model_type, "its layers have different RoPE")
    try:
        fields |= family.flags(read)
    except ValueError as error:
        _refuse(where, family.model_type, str(error))
    spec = ModelSpec(**fields)
    if 0 in spec.windows:
        _refuse(where, family.model_type, "its sliding_window is 0, so that no token sees another")
    if spec.num_heads % spec.num_kv_heads:
        raise UserError(
            f"{where}/config.json has {spec.num_heads} attention heads, which is not a multiple of "
            f"its {spec.num_kv_heads} key/value heads: correct it, or download it again"
        )
    if spec.rope["rope_type"] == "default" and spec.rope["rope_theta"] is not None:
        spec.rope["rope_theta"] = float(spec.rope["rope_theta"])
    return spec


def _check_keys(family: Family, read: PretrainedConfig, config: dict, where: str) -> None:
    """Refuse a model that the flags of the decoder do not describe."""
    if read.hidden_act not in ACTIVATIONS:
        _refuse(where, family.model_type, f"its activation is {shown(read.hidden_act)}, not silu")
    for key, value in family.required_values().items():
        for section in (config, *_rope_sections(config)):
            _check_value(family, key, section.get(key), value, where)
    # A key of the class that is in none of the family's sets is accepted with its default only.
    for name, class_field in type(read).__dataclass_fields__.items():
        if name in config and not family.lists(name):
            _check_value(family, name, config[name], class_field.default, where)


def _check_value(family: Family, key: str, value: Any, required: Any, where: str) -> None:
    if value is None or value == required or (not value and not required):
        return
    reason = REASONS.get(key, f"it has {key} {shown(value)}, which the decoder does not compute")
    _refuse(where, family.model_type, reason)


def _refuse_family(family: object, where: str) -> NoReturn:
    if not isinstance(family, str):
        has = "has no model_type" if family is None else f"has the model_type {shown(family)}"
        raise UserError(
            f"{where}/config.json {has}: add it (one of {', '.join(SUPPORTED)}), or download the "
            "file again"
        )
    _refuse(where, family, reason_to_refuse(family))


def _refuse(where: str, family: str, reason: str) -> NoReturn:
    raise UserError(
        f"{where}: model family {shown(family)} is not supported because {reason}; supported are "
        f"{', '.join(SUPPORTED)}"
        if family not in FAMILIES
        else f"{where}: this model of the family {shown(family)} is not supported because {reason}"
    )


def _rope_sections(config: dict) -> list[dict]:
    return [config.get(key) or {} for key in _ROPE_SECTIONS]


def _check_numbers(config: dict, where: str) -> None:
    """Reject sizes that are not numbers or are absurd; transformers accepts them."""
    for key, most in (_COUNTS | _OPTIONAL_COUNTS).items():
        value = config.get(key)
        if key not in config or (value is None and key in _OPTIONAL_COUNTS):
            continue
        least = 0 if key in _MAY_BE_ZERO else 1
        if type(value) is not int or not least <= value <= most:
            raise UserError(
                f"{where}/config.json has {shown(value)} as {key}, which must be a whole number "
                f"from {least} to {most:,}: correct it, or download it again"
            )
    missing = [key for key in _COUNTS if key not in config]
    if missing:
        raise UserError(
            f"{where}/config.json has no '{missing[0]}': add it, or download the file again"
        )
    for key in _ROPE_SECTIONS:
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(
                f"{where}/config.json has {shown(config[key])} as {key}, which must be a JSON "
                "object: correct it, or download it again"
            )
    for section in (config, *_rope_sections(config)):
        for key in ("rms_norm_eps", "rope_theta", "factor", "partial_rotary_factor"):
            value = section.get(key)
            if value is not None and (type(value) not in (int, float) or not _is_finite(value)):
                raise UserError(
                    f"{where}/config.json has {shown(value)} as {key}, which must be a finite "
                    "number: correct it, or download it again"
                )


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _check_rope_spellings(config: dict, where: str) -> None:
    """Refuse a file whose two descriptions of RoPE differ.

    transformers 4 writes ``rope_theta`` and ``rope_scaling`` at top level, and transformers 5
    writes ``rope_parameters``. A file may have either or both.

    Raises:
        UserError: the file has both and they disagree.
    """
    theta = config.get("rope_theta")
    scaling, new = (_with_rope_type(section) for section in _rope_sections(config))
    if not new or (theta is None and not scaling):
        return
    agree = new.get("rope_type", "default") == scaling.get("rope_type", "default")
    agree &= theta is None or new.get("rope_theta", theta) == theta
    agree &= all(new.get(key, value) == value for key, value in scaling.items())
    if not agree:
        raise UserError(
            f"{where}/config.json describes RoPE twice and differently: rope_parameters {new} but "
            f"rope_theta {theta} with rope_scaling {scaling or None}; correct one of them"
        )


def _with_rope_type(section: dict) -> dict:
    """Return a RoPE section in which the old key ``type`` has its new name."""
    section = dict(section)
    old = section.pop("type", None)
    return section if old is None else {"rope_type": old, **section}
