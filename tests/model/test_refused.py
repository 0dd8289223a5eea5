"""Models the decoder would get wrong are refused by name, with the reason."""

from __future__ import annotations

import json

import pytest

from megalard.errors import UserError
from megalard.model.spec import read_spec, spec_from_config

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
    """The one sentence a config is refused with."""
    with pytest.raises(UserError) as caught:
        spec_from_config(LLAMA | changes, "the/model")
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.startswith("the/model: ")
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
        ("invented", "its layers are not known to this decoder"),
        (None, "its layers are not known to this decoder"),
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


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "max_position_embeddings"])
def test_a_config_that_lacks_a_size_is_refused(key):
    with pytest.raises(UserError, match=f"config.json has no '{key}'"):
        spec_from_config({k: v for k, v in LLAMA.items() if k != key}, "the/model")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no config.json"),
        ("{ cut", "cannot read"),
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
