"""Phi-3: windows, partial RoPE, and the tensors that its files hold as one."""

from __future__ import annotations

from megalard.model.families.phi3 import PHI3
from tests.model.families.configs import flags_of, spec_of


def test_phi3_is_llama_with_windows_and_partial_rope():
    assert flags_of("phi3", pad_token_id=0) == (False, False, False, None, "before")
    spec = spec_of("phi3", pad_token_id=0, sliding_window=5, partial_rotary_factor=0.75)
    assert spec.windows == (5, 5, 5, 5)
    assert (spec.head_dim, spec.rotary_dim) == (8, 6)


def test_fused_tensors_are_in_the_order_of_transformers():
    """``Phi3Attention`` cuts q, k, v and ``Phi3MLP`` cuts gate, up, in this order."""
    assert PHI3.fused == {
        "self_attn.qkv_proj.weight": tuple(f"self_attn.{p}_proj.weight" for p in "qkv"),
        "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    }
    assert PHI3.rope_types == ("longrope",)
