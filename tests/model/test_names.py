"""Names of parameters, taken apart."""

from __future__ import annotations

import pytest

from megalard.model.names import ParameterName, kind_of, projection_name


@pytest.mark.parametrize(
    ("name", "layer", "module", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12, "q_proj", "weight"),
        ("model.layers.0.self_attn.k_proj.bias", 0, "k_proj", "bias"),
        ("model.layers.3.self_attn.o_proj.lora_A", 3, "o_proj", "lora_A"),
        ("model.layers.3.mlp.down_proj.lora_B", 3, "down_proj", "lora_B"),
        ("model.layers.1.input_layernorm.weight", 1, "input_layernorm", "weight"),
        ("model.embed_tokens.weight", None, "embed_tokens", "weight"),
        ("model.norm.weight", None, "norm", "weight"),
        ("lm_head.weight", None, "lm_head", "weight"),
    ],
)
def test_a_name_has_a_layer_a_module_and_a_kind(name, layer, module, kind):
    assert ParameterName.parse(name) == ParameterName(layer, module, kind)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "norm"),
        ("model.layers.1.post_feedforward_layernorm.weight", "norm"),
        ("model.layers.1.self_attn.k_norm.weight", "norm"),
        ("model.layers.1.self_attn.k_proj.bias", "k"),
        ("model.layers.1.self_attn.o_proj.lora_B", "o"),
        ("model.layers.1.mlp.gate_proj.weight", "mlp"),
        ("model.layers.1.mlp.down_proj.weight", "mlp"),
    ],
)
def test_a_gradient_is_reported_with_its_kind(name, kind):
    assert kind_of(name) == kind


def test_projections_have_the_names_of_hugging_face():
    assert projection_name(7, "v") == "model.layers.7.self_attn.v_proj"
