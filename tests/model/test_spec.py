"""Models that the decoder would get wrong are refused, in a sentence."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import LlamaConfig

from megalard.errors import UserError
from megalard.model.spec import read_spec, spec_from_config
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
    return user_error(spec_from_config, LLAMA | changes, "the/model")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "its activation is 'gelu', not silu"),
        ({"num_local_experts": 8}, "it is a mixture of experts"),
        ({"partial_rotary_factor": 0.5}, "its RoPE rotates only a part of each head"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "only a part of each head"),
        ({"rope_interleaved": True}, "its RoPE is interleaved"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantized"),
        ({"is_encoder_decoder": True}, "it has is_encoder_decoder True, which the decoder does"),
        ({"is_causal": False}, "its attention is bidirectional"),
    ],
)
def test_variants_of_a_supported_family_are_refused(changes, reason):
    sentence = refusal(**changes)
    start = "the/model: this model of the family 'llama' is not supported because "
    assert sentence.startswith(start) and reason in sentence


def test_a_key_that_transformers_adds_is_accepted_at_its_default_alone(monkeypatch):
    """A version to come may add a key that changes the logits."""
    field = dataclasses.field(default=1.0)
    field.name = "logit_scale"
    monkeypatch.setitem(LlamaConfig.__dataclass_fields__, "logit_scale", field)
    spec_from_config(LLAMA | {"logit_scale": 1.0}, "the/model")
    assert "because it has logit_scale 0.5, which the decoder does not compute" in refusal(
        logit_scale=0.5
    )


def test_harmless_values_are_not_refused():
    harmless = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "attention_dropout": 0.1}
    spec_from_config(LLAMA | harmless | {"bos_token_id": 3, "a_new_key": 1}, "the/model")


def test_a_config_without_a_family_is_refused():
    config = {key: value for key, value in LLAMA.items() if key != "model_type"}
    assert user_error(spec_from_config, config, "the/model") == (
        "the/model/config.json has no model_type: add it (one of llama, mistral, ministral, qwen2, "
        "qwen3, olmo2, phi3), or download the file again"
    )


@pytest.mark.parametrize("family", [{}, [], ["llama"], 7, True, 1.5])
def test_a_family_that_is_no_name_is_refused(family):
    sentence = user_error(spec_from_config, LLAMA | {"model_type": family}, "the/model")
    assert sentence.startswith(f"the/model/config.json has the model_type {family!r}: add it (one")


def test_heads_that_do_not_divide_are_refused():
    sentence = user_error(spec_from_config, LLAMA | {"num_key_value_heads": 3}, "the/model")
    assert "4 attention heads, which is not a multiple of its 3 key/value heads" in sentence


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "x"),
        ("hidden_size", 2**20 + 1),
        ("sliding_window", -1),
        ("rope_theta", float("inf")),
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


def test_a_number_beyond_floats_is_refused_and_not_printed_in_full():
    sentence = user_error(spec_from_config, LLAMA | {"rope_theta": 10**400}, "the/model")
    assert "has a whole number of 1329 bits as rope_theta, which must be a finite" in sentence


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


@pytest.mark.parametrize(("partial", "rotary"), [(None, 8), (1.0, 8), (0.5, 4)])
def test_the_rotary_features_are_part_of_a_head(partial, rotary):
    config = LLAMA | {"model_type": "phi3", "pad_token_id": 0}
    if partial is not None:
        config["partial_rotary_factor"] = partial
    assert spec_from_config(config, "the/model").rotary_dim == rotary
