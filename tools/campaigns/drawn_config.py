"""Draw a ``config.json`` such as users have, and the random model that it describes."""

from __future__ import annotations

import random
from typing import Any

FAMILIES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "olmo2", "phi3")

# The number of positions before scaling, and the longer text on which logits are compared.
ORIGINAL, LENGTH = 16, 40


def draw_family(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return a ``model_type`` and the keys of a small model, complete and consistent."""
    family = rng.choice(FAMILIES)
    heads = rng.choice([2, 4])
    config: dict[str, Any] = {
        "vocab_size": rng.choice([303, 310, 320]),
        "hidden_size": 32,
        "intermediate_size": rng.choice([40, 48]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([n for n in (1, 2, 4) if heads % n == 0]),
        "max_position_embeddings": 64,
        "pad_token_id": rng.choice([None, 0]) if family != "phi3" else 0,
        "bos_token_id": 257,
        "eos_token_id": 256,
        "tie_word_embeddings": rng.random() < 0.3,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
    }
    layers = config["num_hidden_layers"]
    if family == "ministral" or (family in ("mistral", "qwen3") and rng.random() < 0.3):
        config["head_dim"] = rng.choice([8, 16])
    if family == "qwen3":
        config.setdefault("head_dim", 16)
    if family in ("llama", "qwen3", "olmo2"):
        config["attention_bias"] = rng.random() < 0.3
    if family == "llama":
        config["mlp_bias"] = rng.random() < 0.3
    if family in ("mistral", "phi3"):
        config["sliding_window"] = rng.choice([None, 7, 4096])
    if family == "ministral":
        config["sliding_window"] = rng.choice([7, 20])
        config["layer_types"] = draw_layer_types(rng, layers)
    if family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = rng.random() < 0.5
        config["sliding_window"] = rng.choice([None, 7, 20])
        config["max_window_layers"] = rng.choice([0, 1, layers])
        if config["use_sliding_window"] and config["sliding_window"] and rng.random() < 0.5:
            config["layer_types"] = draw_layer_types(rng, layers)
    return family, config


def draw_layer_types(rng: random.Random, layers: int) -> list[str]:
    """Return one type of attention per layer."""
    return [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]


def draw_rope(rng: random.Random, family: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that describe RoPE, in one of the spellings that files have."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = rng.choice([10000.0, 500000.0, 1e6])
    kind = rng.choice(["default", "default", "linear", "yarn", "llama3", "longrope", "dynamic"])
    if family == "phi3":
        kind = rng.choice(["default", "longrope"])
    partial = rng.choice([1.0, 0.5]) if family == "phi3" else None
    section: dict[str, Any] = {"rope_type": kind}
    rotary = int(head_dim * (partial or 1.0))
    if kind in ("linear", "yarn", "llama3", "dynamic"):
        section["factor"] = rng.choice([1.0, 2.0, 4.0])
    if kind == "llama3":
        section |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        lists = [[rng.choice([1.0, 1.5, 2.0, 4.0]) for _ in range(rotary // 2)] for _ in range(2)]
        section |= {"short_factor": lists[0], "long_factor": rng.choice(lists)}
    if kind == "yarn" and rng.random() < 0.3:
        section |= rng.choice(
            [{"attention_factor": 0.8}, {"beta_fast": 16.0}, {"truncate": False}, {"mscale": 0.7}]
        )
    outside: dict[str, Any] = {}
    if kind in ("yarn", "llama3", "longrope"):
        place = rng.choice(["inside", "inside", "outside", "both", "nowhere"])
        if place in ("inside", "both"):
            section["original_max_position_embeddings"] = ORIGINAL
        if place in ("outside", "both") or family == "phi3":
            outside["original_max_position_embeddings"] = ORIGINAL
    if partial is not None:
        outside["partial_rotary_factor"] = partial
    return _spell(rng, family, section, theta) | outside


def _spell(rng: random.Random, family: str, section: dict, theta: float) -> dict[str, Any]:
    """Return the RoPE section and theta in the spelling of transformers 4, of 5, or in both."""
    old = {k: v for k, v in section.items() if k != "rope_type"}
    old_key = "type" if family == "phi3" or rng.random() < 0.3 else "rope_type"
    old = {old_key: section["rope_type"], **old} if section["rope_type"] != "default" else None
    spelling = rng.choice(["old", "new", "both"])
    if spelling == "new" and family != "phi3":
        return {"rope_parameters": {**section, "rope_theta": theta}}
    if spelling == "both" and family != "phi3":
        new = {**section, "rope_theta": theta}
        return {"rope_theta": theta, "rope_scaling": old, "rope_parameters": new}
    return {"rope_theta": theta, "rope_scaling": old}


def change_config(rng: random.Random, config: dict[str, Any]) -> str:
    """Change one key in place, as people and other programs do; return a description."""
    choice = rng.choice(_CHANGES)
    return choice(rng, config)


def _add_foreign_keys(rng: random.Random, config: dict[str, Any]) -> str:
    keys = {
        "auto_map": {"AutoConfig": "configuration_x.XConfig"},
        "unsloth_version": "2024.9",
        "_attn_implementation_autoset": True,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "final_logit_softcapping": 30.0,
        "use_qk_norm": True,
        "max_sequence_length": 64,
        "torch_dtype": "float32",
        "use_cache": False,
        "pretraining_tp": 2,
    }
    name = rng.choice(sorted(keys))
    config[name] = keys[name]
    return f"the key {name}"


def _set_key_that_matters(rng: random.Random, config: dict[str, Any]) -> str:
    keys: dict[str, list[Any]] = {
        "is_causal": [False, True],
        "hidden_act": ["gelu", "swish", "silu", "relu"],
        "quantization_config": [None, {}, {"quant_method": "bitsandbytes", "load_in_4bit": True}],
        "is_encoder_decoder": [False],
        "partial_rotary_factor": [0.5, 1.0, None],
        "num_local_experts": [None, 0, 8],
        "head_dim": [16, None],
        "sliding_window": [None, 5, 0],
        "layer_types": [["full_attention"], ["chunked_attention"] * 3, None],
        "tie_word_embeddings": [True, False, None],
        "chunk_size_feed_forward": [0],
    }
    name = rng.choice(sorted(keys))
    config[name] = rng.choice(keys[name])
    return f"{name} {config[name]!r}"


def _remove(rng: random.Random, config: dict[str, Any]) -> str:
    name = rng.choice(sorted(config))
    config.pop(name)
    return f"without {name}"


def _set_other_type(rng: random.Random, config: dict[str, Any]) -> str:
    name = rng.choice(sorted(config))
    config[name] = rng.choice([None, "", "64", -1, 0, 2.5, [], {}, True, 10**12, float("nan")])
    return f"{name} {config[name]!r}"


def _change_size(rng: random.Random, config: dict[str, Any]) -> str:
    names = ("num_hidden_layers", "num_key_value_heads", "vocab_size", "intermediate_size")
    name = rng.choice(names)
    config[name] = rng.choice([1, 2, 3, 7, 48, 259])
    return f"{name} {config[name]}"


def _change_nothing(rng: random.Random, config: dict[str, Any]) -> str:
    return "as it is"


_CHANGES = (
    _change_nothing,
    _change_nothing,
    _change_nothing,
    _add_foreign_keys,
    _set_key_that_matters,
    _remove,
    _set_other_type,
    _change_size,
)
