"""The table of families: other families are refused with the reason."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from megalard.model.families import FAMILIES
from megalard.model.spec import spec_from_config
from tests.command_line import user_error

# Large enough that defaults which depend on the shape differ from each other.
SPARSE = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "max_position_embeddings": 64,
}


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
        ("olmo", "layer norms without weights"),
        ("olmo3", "scales RoPE in its layers with full attention alone"),
        ("phi", "layer norms, and runs attention and MLP in parallel"),
        ("phi4_multimodal", "reads images and sound"),
        ("smollm3", "some of its layers have no RoPE"),
        ("mixtral", "mixture of experts"),
        ("phimoe", "mixture of experts"),
        ("olmoe", "mixture of experts"),
        ("qwen2_moe", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("granitemoe", "mixture of experts"),
        ("deepseek_v3", "mixture of experts with latent attention"),
        ("llama4", "mixture of experts with interleaved RoPE"),
        ("mistral3", "reads images"),
        ("ministral3", "scales queries by their position"),
        ("falcon", "in parallel, with fused projections"),
        ("stablelm", "its norms are layer norms"),
        ("gpt2", "does not use rotary half-split RoPE"),
        ("invented", "megalard has no decoder for its layers"),
    ],
)
def test_unsupported_families_are_refused_by_name(family, reason):
    sentence = user_error(spec_from_config, SPARSE | {"model_type": family}, "the/model")
    assert sentence.startswith(f"the/model: model family '{family}' is not supported because ")
    assert reason in sentence
    supported = "supported are llama, mistral, ministral, qwen2, qwen3, olmo2, phi3"
    assert sentence.endswith(supported)


def test_the_supported_families_are_these():
    assert [*FAMILIES] == ["llama", "mistral", "ministral", "qwen2", "qwen3", "olmo2", "phi3"]
    assert all(family.model_type == name for name, family in FAMILIES.items())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3"])
def test_a_config_has_the_defaults_of_transformers(family):
    extra = {"pad_token_id": 0} if family == "phi3" else {}
    theirs = CONFIG_MAPPING[family](**SPARSE, **extra)
    ours = spec_from_config({"model_type": family, **SPARSE, **extra}, "here")
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 30
    window = getattr(theirs, "sliding_window", None)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope == theirs.rope_parameters
    assert ours.windows == tuple(window if k == "sliding_attention" else None for k in kinds)
