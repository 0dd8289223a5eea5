"""config.json as public models and bug reports have it: read as transformers reads it, or refused.

Each row is one file: a small model is saved, its config.json is changed, and its logits beyond the
original window are compared with those of transformers. A row says what is expected, so that a
refusal that becomes a silent difference fails, and so does a model that is refused without need.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import user_error
from tests.logits import (
    assert_same_logits,
    decoder_logits,
    load,
    random_tokens,
    transformers_logits,
)
from tests.models import make_model

WINDOW, ORIGINAL, LENGTH = 64, 16, 48
FULL, SLIDING = "full_attention", "sliding_attention"
QWEN3 = {"head_dim": 16}
LISTS = {"short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0]}
SAME_LISTS = {"short_factor": LISTS["long_factor"], "long_factor": LISTS["long_factor"]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0}


@dataclass(frozen=True)
class Row:
    """A config.json.

    Attributes:
        name: what it is.
        changes: entries that are set; an entry ``...`` is removed.
        family: a name in ``tests.models.FAMILIES``.
        made: the model that is saved, where it is not the usual one.
    """

    name: str
    changes: dict[str, Any]
    family: str = "llama"
    made: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def rope(name: str, family: str = "llama", **changes: Any) -> Row:
    """Return a row without RoPE parameters in the spelling of transformers 5."""
    made = QWEN3 if family == "qwen3" else {}
    return Row(name, {"rope_parameters": ..., **changes}, family, made)


def section(**entries: Any) -> dict[str, Any]:
    """Return the entries of a RoPE section, with the original window in it."""
    return {**entries, "original_max_position_embeddings": ORIGINAL}


ROPES = [
    rope("theta as a whole number", rope_theta=500000),
    rope("no theta in llama"),
    rope("no theta in qwen2", family="qwen2"),
    rope("no theta in qwen3", family="qwen3"),
    rope("theta null", rope_theta=None),
    rope("no scaling", rope_scaling=None, rope_theta=1e6),
    rope("empty scaling", rope_scaling={}, rope_theta=1e6),
    rope("scaling of type default", rope_scaling={"type": "default"}, rope_theta=1e6),
    rope("theta in scaling", rope_scaling={"rope_type": "default", "rope_theta": 5e5}),
    rope("two thetas", rope_scaling={"rope_type": "default", "rope_theta": 5e5}, rope_theta=1e4),
    rope("parameters without a type", rope_parameters={"rope_theta": 5e5}),
    rope("theta next to parameters", rope_parameters={"rope_type": "default"}, rope_theta=5e5),
    rope("linear", rope_scaling={"type": "linear", "factor": 4.0}),
    rope("linear by one", rope_scaling={"type": "linear", "factor": 1.0}),
    rope("a whole factor", rope_scaling={"type": "linear", "factor": 4}),
    rope("a factor in quotes", rope_scaling={"type": "linear", "factor": "4.0"}),
    rope("two types", rope_scaling=section(type="linear", rope_type="yarn", factor=4.0)),
    rope(
        "qwen2.5 with the old window",
        family="qwen2",
        rope_theta=1e6,
        rope_scaling={**YARN, "original_max_position_embeddings": WINDOW},
    ),
    rope("yarn without an original", family="qwen2", rope_scaling=YARN, rope_theta=1e6),
    rope("yarn with its constants", rope_scaling=section(**YARN, beta_fast=32, beta_slow=1)),
    rope("yarn, attention factor null", rope_scaling=section(**YARN, attention_factor=None)),
    rope("yarn, attention factor", rope_scaling=section(**YARN, attention_factor=0.8)),
    rope("yarn with mscale", rope_scaling=section(**YARN, mscale=0.7, mscale_all_dim=1.0)),
    rope("yarn without truncation", rope_scaling=section(**YARN, truncate=False)),
    rope("yarn without a factor", rope_scaling=section(type="yarn")),
    rope("yarn with another key", rope_scaling=section(**YARN, finetuned=True)),
    rope("yarn, original outside", rope_scaling=YARN, original_max_position_embeddings=ORIGINAL),
    rope("llama3", rope_scaling=section(rope_type="llama3", **LLAMA3), rope_theta=5e5),
    rope("llama3 under the key type", rope_scaling=section(type="llama3", **LLAMA3)),
    rope(
        "llama3, original outside",
        rope_scaling={"rope_type": "llama3", **LLAMA3},
        original_max_position_embeddings=ORIGINAL,
    ),
    rope(
        "llama3, two originals",
        rope_scaling={"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 32},
        original_max_position_embeddings=ORIGINAL,
    ),
    rope(
        "longrope, original outside",
        rope_scaling={"type": "longrope", **SAME_LISTS},
        original_max_position_embeddings=ORIGINAL,
    ),
    rope(
        "longrope by its first name",
        rope_scaling={"type": "su", **SAME_LISTS},
        original_max_position_embeddings=ORIGINAL,
    ),
    rope("longrope with two lists", rope_scaling=section(type="longrope", **LISTS)),
    rope(
        "both spellings",
        rope_theta=10000,
        rope_scaling={"type": "linear", "factor": 2},
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    rope(
        "parameters and theta",
        rope_theta=10000,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    rope(
        "parameters and scaling null",
        rope_theta=10000.0,
        rope_scaling=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    rope("half of a head in scaling", rope_scaling={"partial_rotary_factor": 0.5}),
    rope("half of a head outside", partial_rotary_factor=0.5, rope_theta=1e4),
    rope("proportional", rope_scaling={"rope_type": "proportional", "factor": 2.0}),
    rope(
        "rope by layer type",
        family="qwen2",
        layer_types=[FULL] * 3,
        rope_parameters={FULL: {"rope_type": "default", "rope_theta": 5e5}},
    ),
    rope(
        "rope by layer type, one null",
        family="qwen3",
        layer_types=[FULL] * 3,
        rope_parameters={FULL: {"rope_type": "default", "rope_theta": 5e5}, SLIDING: None},
    ),
]

ON = {"use_sliding_window": True, "sliding_window": 8}
OFF = {"use_sliding_window": False}
OTHERS = [
    Row("qwen2.5", {"layer_types": ..., **OFF, "sliding_window": None}, "qwen2"),
    Row("window off", {"layer_types": ..., **OFF, "sliding_window": 8}, "qwen2"),
    Row("window on", {"layer_types": ..., **ON, "max_window_layers": 1}, "qwen2"),
    Row("windows beyond the layers", {"layer_types": ..., **ON, "max_window_layers": 28}, "qwen2"),
    Row("types decide", {**ON, "layer_types": [SLIDING, FULL, SLIDING]}, "qwen2"),
    Row("off, types sliding", {**OFF, "layer_types": [SLIDING, FULL, SLIDING]}, "qwen2"),
    Row("on, window null", {"layer_types": ..., **ON, "sliding_window": None}, "qwen2"),
    Row("on, window zero", {"layer_types": ..., **ON, "sliding_window": 0}, "qwen2"),
    Row("types too short", {**ON, "layer_types": [SLIDING, FULL]}, "qwen2"),
    Row("types too long", {**ON, "layer_types": [SLIDING, FULL, FULL, SLIDING]}, "qwen2"),
    Row("types too long, all full", {"num_hidden_layers": 2, "layer_types": [FULL] * 3}, "qwen2"),
    Row("qwen3 window", {"layer_types": ..., **ON, "max_window_layers": 2}, "qwen3", QWEN3),
    Row("qwen3 biases", {}, "qwen3", {**QWEN3, "attention_bias": True}),
    Row("qwen2 attention_bias", {"attention_bias": False}, "qwen2"),
    Row("mistral window null", {"sliding_window": None}, "mistral"),
    Row("mistral window absent", {"sliding_window": ...}, "mistral"),
    Row("mistral window 8", {"sliding_window": 8}, "mistral"),
    Row("mistral window -1", {"sliding_window": -1}, "mistral"),
    Row("windows as a list", {"sliding_window": [None, 8, 8]}, "mistral"),
    Row("interleaved windows", {"interleaved_sliding_window": [None, 8, 8]}, "mistral"),
    Row("ministral", {"sliding_window": 8, "layer_types": [FULL, SLIDING, FULL]}, "mistral"),
    Row("ministral, all full", {"sliding_window": 8, "layer_types": [FULL] * 3}, "mistral"),
    Row("ministral, null", {"sliding_window": None, "layer_types": [FULL] * 3}, "mistral"),
    Row("a wide head", {}, "mistral", {"head_dim": 16}),
    Row("head_dim null", {"head_dim": None}, "mistral"),
    Row("mistral attention_bias", {"attention_bias": True}, "mistral"),
    Row(
        "heads that do not divide",
        {},
        "mistral",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
    ),
    Row("llama window", {"sliding_window": 8}),
    Row("llama head_dim", {}, "llama", {"head_dim": 16}),
    Row("kv heads null", {"num_key_value_heads": None}, "llama-mha"),
    Row("kv heads zero", {"num_key_value_heads": 0}, "llama-mha"),
    Row("biases", {}, "llama-biases"),
    Row("biases in the files alone", {"attention_bias": False, "mlp_bias": False}, "llama-biases"),
    Row("attention_bias null", {"attention_bias": None}),
    Row("eps as a whole number", {"rms_norm_eps": 1}),
    Row("eps absent", {"rms_norm_eps": ...}),
    Row("activation null", {"hidden_act": None}),
    Row("granite's scales", {"logits_scaling": 8.0, "attention_multiplier": 0.1}),
    Row("tied null", {"tie_word_embeddings": None}),
    Row("tied absent", {"tie_word_embeddings": ...}),
    Row("norms of q and k", {"use_qk_norm": True}),
    Row("fewer layers than the files", {"num_hidden_layers": 2}),
    Row("fewer ids than rows", {"vocab_size": 60}),
    Row("16-bit weights called quantized", {"quantization_config": {"load_in_4bit": True}}),
]


ROWS = ROPES + OTHERS

# transformers from 5.20 on reads a RoPE by layer type, and an earlier one fails at it.
LAYERED = "its layers have different RoPE|'get'"
# What neither transformers nor we read, and a part of our sentence, or several divided by |.
REFUSED_BY_BOTH = {
    "theta null": "describes a RoPE that transformers cannot build",
    "a factor in quotes": "has '4.0' as factor, which must be a finite number",
    "yarn without a factor": "Missing required keys",
    "longrope by its first name": "it has no 'su'",
    "rope by layer type": LAYERED,
    "rope by layer type, one null": LAYERED,
    "off, types sliding": "it has no sliding_window",
    "types too short": "`num_hidden_layers` (3) must be equal",
    "types too long": "`num_hidden_layers` (3) must be equal",
    "types too long, all full": "`num_hidden_layers` (2) must be equal",
    "windows as a list": "has [None, 8, 8] as sliding_window",
    "ministral, null": "it has layer_types and no sliding_window",
    "kv heads zero": "has 0 as num_key_value_heads",
    "attention_bias null": "expected bool, got NoneType",
    "eps as a whole number": "expected float, got int",
    "activation null": "expected str, got NoneType",
    "tied null": "expected bool, got NoneType",
    "fewer ids than rows": "has shape [67, 32], but config.json implies [60, 32]",
    "16-bit weights called quantized": "its weights are quantized",
}
# What transformers reads in one way or another, and we refuse.
REFUSED_BY_US = {
    "parameters and theta": "describes RoPE twice and differently",
    "half of a head in scaling": "its RoPE rotates only a part of each head",
    "half of a head outside": "its RoPE rotates only a part of each head",
    "mistral window -1": "has -1 as sliding_window",
}
REFUSED = {**REFUSED_BY_BOTH, **REFUSED_BY_US}


def make(row: Row, folder: Path) -> Path:
    """Write the model of a row."""
    model = make_model(row.family, folder / "model", **row.made)
    config = json.loads((model / "config.json").read_text()) | row.changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (model / "config.json").write_text(json.dumps(kept))
    return model


@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in REFUSED], ids=str)
def test_a_config_is_read_as_transformers_reads_it(row, tmp_path):
    model = make(row, tmp_path)
    tokens = random_tokens(2, LENGTH)
    assert_same_logits(decoder_logits(load(model), tokens), transformers_logits(model, tokens))


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in REFUSED], ids=str)
def test_a_config_that_cannot_be_read_is_refused(row, tmp_path):
    model = make(row, tmp_path)
    sentence = user_error(load, model)
    assert any(part in sentence for part in REFUSED[row.name].split("|"))
    tokens = random_tokens(2, LENGTH, 60)
    if row.name in REFUSED_BY_US:
        assert transformers_logits(model, tokens).isfinite().all()
    else:
        # transformers raises whatever the place raises where it goes wrong.
        with pytest.raises(Exception):  # noqa: B017
            transformers_logits(model, tokens)


def test_every_refusal_is_of_a_row():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) and set(REFUSED) <= set(names)
