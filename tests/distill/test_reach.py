"""How deep a loss reads: the parameters it depends on, written out."""

from __future__ import annotations

import pytest

from megalard.distill.reach import LayerDepth, Reach, deepest

LAYER_0 = "model.layers.0."
LAYER_1 = "model.layers.1."
PARTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.q_norm",
    "self_attn.k_proj",
    "self_attn.k_norm",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
ALL = [
    "model.embed_tokens.weight",
    *(f"{layer}{part}.weight" for layer in (LAYER_0, LAYER_1) for part in PARTS),
    "model.norm.weight",
    "lm_head.weight",
]
COMPLETE_0 = {name for name in ALL if name.startswith(LAYER_0)} | {"model.embed_tokens.weight"}


def last_layer(*parts: str) -> set[str]:
    return {f"{LAYER_1}{part}.weight" for part in parts}


@pytest.mark.parametrize(
    ("reach", "expected"),
    [
        (
            Reach(1, LayerDepth.QKV, frozenset("q")),
            COMPLETE_0 | last_layer("input_layernorm", "self_attn.q_proj", "self_attn.q_norm"),
        ),
        # Q Kᵀ depends on both projections.
        (
            Reach(1, LayerDepth.QKV, frozenset("qk")),
            COMPLETE_0
            | last_layer(
                "input_layernorm",
                "self_attn.q_proj",
                "self_attn.q_norm",
                "self_attn.k_proj",
                "self_attn.k_norm",
            ),
        ),
        (
            Reach(1, LayerDepth.QKV, frozenset("v")),
            COMPLETE_0 | last_layer("input_layernorm", "self_attn.v_proj"),
        ),
        # The attention output comes before the output projection.
        (Reach(1, LayerDepth.ATTENTION), COMPLETE_0 | last_layer(*PARTS[:6])),
        (Reach(0, LayerDepth.WHOLE), COMPLETE_0),
        (Reach(1, LayerDepth.WHOLE, norm=True), set(ALL) - {"lm_head.weight"}),
        (Reach(1, LayerDepth.WHOLE, norm=True, head=True), set(ALL)),
        (
            Reach(0, LayerDepth.QKV, frozenset("k")),
            {
                "model.embed_tokens.weight",
                f"{LAYER_0}input_layernorm.weight",
                f"{LAYER_0}self_attn.k_proj.weight",
                f"{LAYER_0}self_attn.k_norm.weight",
            },
        ),
    ],
)
def test_a_loss_depends_on_what_it_reads_and_all_before(reach, expected):
    assert {name for name in ALL if reach.includes(name)} == expected


def test_biases_and_lora_pairs_belong_to_their_projection():
    reach = Reach(0, LayerDepth.QKV, frozenset("q"))
    assert reach.includes(f"{LAYER_0}self_attn.q_proj.bias")
    assert reach.includes(f"{LAYER_0}self_attn.q_proj.lora_A")
    assert not reach.includes(f"{LAYER_0}self_attn.v_proj.lora_B")


def test_the_deepest_of_several_is_computed():
    reaches = [
        Reach(2, LayerDepth.QKV),
        Reach(1, LayerDepth.WHOLE),
        Reach(2, LayerDepth.ATTENTION),
        Reach(0, LayerDepth.WHOLE),
    ]
    assert deepest(reaches) == reaches[2]
    head = Reach(2, LayerDepth.WHOLE, norm=True, head=True)
    assert deepest([*reaches, head, Reach(2, LayerDepth.WHOLE)]) == head
