"""Flags are read as transformers reads them; models the decoder would get wrong are refused."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from megalard.errors import UserError
from megalard.model.spec import SUPPORTED, read_spec, spec_from_config
from tests.command_line import user_error

LLAMA = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def refusal(**changes) -> str:
    """Return the sentence with which a config is refused."""
    sentence = user_error(spec_from_config, LLAMA | changes, "the/model")
    assert sentence.startswith("the/model: ")
    return sentence


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma", "scales embeddings and adds one to its norm weights"),
        ("gemma2", "scales embeddings"),
        ("gemma3_text", "scales embeddings"),
        ("granite", "its own constants"),
        ("cohere", "layer norms, parallel blocks and interleaved RoPE"),
        ("cohere2", "layer norms"),
        ("glm", "interleaved and partial"),
        ("glm4", "interleaved and partial"),
        ("olmo2", "norms after the blocks"),
        ("phi3", "projections are fused"),
        ("mixtral", "mixture of experts"),
        ("qwen2_moe", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("granitemoe", "mixture of experts"),
        ("deepseek_v3", "mixture of experts with latent attention"),
        ("llama4", "mixture of experts with interleaved RoPE"),
        ("invented", "this decoder does not know its layers"),
        (None, "this decoder does not know its layers"),
    ],
)
def test_unsupported_families_are_refused_by_name(family, reason):
    sentence = refusal(model_type=family)
    assert f"model family '{family}' is not supported because" in sentence
    assert reason in sentence
    assert sentence.endswith("supported are llama, mistral, qwen2, qwen3")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation is gelu, not silu"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"partial_rotary_factor": 0.5}, "only a part of each head"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "only a part of each head"),
        ({"rope_interleaved": True}, "RoPE is interleaved"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights are quantized"),
    ],
)
def test_variants_of_a_supported_family_are_refused(changes, reason):
    assert reason in refusal(**changes)


def test_harmless_values_are_not_refused():
    spec_from_config(LLAMA | {"hidden_act": "silu", "partial_rotary_factor": 1.0}, "the/model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "x"),
        ("hidden_size", 32.5),
        ("num_attention_heads", 0),
        ("vocab_size", None),
        ("num_hidden_layers", True),
        ("head_dim", "8"),
        ("rms_norm_eps", "small"),
        ("rope_theta", []),
        ("rope_parameters", "x"),
        ("rope_parameters", {"rope_theta": "x"}),
    ],
)
def test_a_value_of_another_kind_is_refused(key, value):
    sentence = user_error(spec_from_config, LLAMA | {key: value}, "the/model")
    if isinstance(value, dict):
        ((key, value),) = value.items()
    assert sentence.startswith(f"the/model/config.json has {value!r} as {key}, which must be ")
    assert sentence.endswith("correct it, or download it again")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "max_position_embeddings"])
def test_a_config_that_lacks_a_size_is_refused(key):
    with pytest.raises(UserError, match=f"config.json has no '{key}'"):
        spec_from_config({k: v for k, v in LLAMA.items() if k != key}, "the/model")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no config.json"),
        ("{ cut", r"config.json is not JSON \(.*\): correct it, or download it again"),
        ("[]", "does not hold a JSON object"),
    ],
)
def test_an_unreadable_config_is_refused(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_spec(tmp_path)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no model directory at .*nowhere"):
        read_spec(tmp_path / "nowhere")


def test_a_complete_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_spec(tmp_path).num_kv_heads == 4


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_config_has_the_defaults_of_transformers(family):
    sparse = {
        "model_type": family,
        "vocab_size": 67,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "max_position_embeddings": 64,
    }
    theirs = CONFIG_MAPPING[family](**sparse)
    ours = spec_from_config(sparse, "here")
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 30
    window = getattr(theirs, "sliding_window", None)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope == theirs.rope_parameters
    assert ours.windows == tuple(window if k == "sliding_attention" else None for k in kinds)
    if family.startswith("qwen"):
        windowed = {**sparse, "use_sliding_window": True}
        kinds = CONFIG_MAPPING[family](**windowed).layer_types
        expected = tuple(4096 if k == "sliding_attention" else None for k in kinds)
        assert spec_from_config(windowed, "here").windows == expected
