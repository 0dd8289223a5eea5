"""The shape and flags of a decoder, read from a Hugging Face ``config.json``.

The decoder is driven by these flags, not by the names of model families. A family whose model
differs in a way that the flags do not describe is refused by name, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megalard.errors import UserError, shown
from megalard.files.reading import read_json

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_ROPE_SECTIONS = ("rope_scaling", "rope_parameters")
_OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim", "sliding_window", "max_window_layers")

# The defaults of transformers where they differ from family to family.
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_DEFAULTS = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}

_REFUSED = {
    "gemma": "it scales embeddings and adds one to its norm weights",
    "granite": "it multiplies embeddings, residuals, attention and logits by its own constants",
    "cohere": "it uses layer norms, parallel blocks and interleaved RoPE",
    "glm": "its RoPE is interleaved and partial, with fused gate and up projections",
    "olmo": "it norms after the blocks, and its queries and keys over the whole hidden size",
    "phi": "its q/k/v and gate/up projections are fused",
    "mixtral": "it is a mixture of experts",
    "deepseek": "it is a mixture of experts with latent attention",
    "llama4": "it is a mixture of experts with interleaved RoPE",
    "falcon": "its blocks run attention and MLP in parallel, with fused projections",
    "stablelm": "its RoPE is partial and its norms are layer norms",
    "gpt": "it does not use rotary half-split RoPE with RMS norms and SwiGLU",
}


@dataclass(frozen=True)
class ModelSpec:
    """The shape and flags of a decoder.

    Attributes:
        windows: one entry per layer. None is full causal attention; with w, query i sees key j only
            if i - j < w.
        max_positions: the number of positions that the model reads.
        rope: the description of RoPE in the spelling of transformers 5 (``rope_type``,
            ``rope_theta``, ...).
        hf_config: the content of config.json, for export.
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
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    max_positions: int
    rope: dict = field(hash=False)
    hf_config: dict = field(hash=False, repr=False)


def read_spec(model_dir: str | Path) -> ModelSpec:
    """Read ``config.json`` of a Hugging Face model directory.

    Raises:
        UserError: the directory or the file is missing, the JSON is invalid, or the decoder would
            compute the model wrongly.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise UserError(f"no model directory at {model_dir}: give a Hugging Face model directory")
    path = model_dir / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{model_dir} has no config.json: give a Hugging Face model directory"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): correct it, or download it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object: give a Hugging Face model directory")
    return spec_from_config(config, str(model_dir))


def spec_from_config(config: dict, where: str) -> ModelSpec:
    """Return the spec of a ``config.json`` dictionary; ``where`` names the file in errors."""
    family = config.get("model_type")
    _refuse(config, family, where)
    hf_config, config = config, {**_DEFAULTS[family], **config}
    _check_numbers(config, where)
    try:
        heads = config["num_attention_heads"]
        layers = config["num_hidden_layers"]
        hidden = config["hidden_size"]
        # The classes of the other families do not read these flags.
        attention_bias = family in ("llama", "qwen3") and bool(config.get("attention_bias"))
        return ModelSpec(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
            qk_norm=family == "qwen3",
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            windows=_windows(config, family, layers),
            max_positions=config["max_position_embeddings"],
            rope=rope_parameters(config, where),
            hf_config=hf_config,
        )
    except KeyError as error:
        raise UserError(f"{where}/config.json has no {error}") from None


def rope_parameters(config: dict, where: str) -> dict:
    """Return the description of RoPE in the spelling of transformers 5.

    transformers 4 writes ``rope_theta`` and ``rope_scaling`` at top level, and transformers 5
    writes ``rope_parameters``. The file may have either or both.

    Raises:
        UserError: the file has both and they disagree.
    """
    theta = config.get("rope_theta")
    scaling = dict(config.get("rope_scaling") or {})
    new = dict(config.get("rope_parameters") or {})
    for spelling in (scaling, new):
        old_key = spelling.pop("type", None)
        if old_key is not None:
            spelling.setdefault("rope_type", old_key)
    if new and (theta is not None or scaling):
        old_type = scaling.get("rope_type", "default")
        agree = new.get("rope_type", "default") == old_type
        agree &= theta is None or float(new.get("rope_theta", theta)) == float(theta)
        agree &= all(new.get(key, value) == value for key, value in scaling.items())
        if not agree:
            raise UserError(
                f"{where}/config.json describes RoPE twice and differently: rope_parameters {new} "
                f"but rope_theta {theta} with rope_scaling {scaling or None}; correct one of them"
            )
    merged = {"rope_type": "default", "rope_theta": 10000.0 if theta is None else theta}
    merged |= scaling
    merged |= new
    merged["rope_theta"] = float(merged["rope_theta"])
    return merged


def _windows(config: dict, family: str, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if not window or family == "llama":
        return (None,) * layers
    if family == "mistral":
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = config["max_window_layers"]
    return tuple(window if layer >= first else None for layer in range(layers))


def _check_numbers(config: dict, where: str) -> None:
    """Reject values that are not numbers; missing keys are reported by the caller."""
    for key in (*_COUNTS, *_OPTIONAL_COUNTS):
        value, least = config.get(key), 1 if key in _COUNTS else 0
        optional = key not in config or (value is None and key in _OPTIONAL_COUNTS)
        if not optional and (type(value) is not int or value < least):
            raise UserError(
                f"{where}/config.json has {shown(value)} as {key}, which must be a whole number of "
                f"at least {least}: correct it, or download it again"
            )
    ropes = [config.get(key) or {} for key in _ROPE_SECTIONS]
    for section, key in ((config, "rms_norm_eps"), *((s, "rope_theta") for s in (config, *ropes))):
        value = section.get(key)
        if value is not None and type(value) not in (int, float):
            raise UserError(
                f"{where}/config.json has {shown(value)} as {key}, which must be a number: "
                "correct it, or download it again"
            )


def _refuse(config: dict, family: str | None, where: str) -> None:
    def refuse(reason: str) -> None:
        raise UserError(
            f"{where}: model family '{family}' is not supported because {reason}; supported are "
            f"{', '.join(SUPPORTED)}"
        )

    if family not in SUPPORTED:
        lowered = str(family)
        if "moe" in lowered:
            refuse("it is a mixture of experts")
        known = [name for name in _REFUSED if lowered.startswith(name)]
        refuse(_REFUSED[max(known, key=len)] if known else "this decoder does not know its layers")
    for key in _ROPE_SECTIONS:
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(
                f"{where}/config.json has {shown(config[key])} as {key}, which must be a JSON "
                "object: correct it, or download it again"
            )
    if config.get("num_local_experts") or config.get("num_experts"):
        refuse("it is a mixture of experts")
    if config.get("hidden_act", "silu") != "silu":
        refuse(f"its activation is {config['hidden_act']}, not silu")
    if config.get("rope_interleave") or config.get("rope_interleaved"):
        refuse("its RoPE is interleaved")
    partial = (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    if (config.get("partial_rotary_factor") or partial or 1.0) != 1.0:
        refuse("its RoPE rotates only a part of each head")
    if config.get("quantization_config"):
        refuse("its weights are quantized: give the unquantized checkpoint")
