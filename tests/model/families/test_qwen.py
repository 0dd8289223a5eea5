"""Qwen2's and Qwen3's flags: biases, norms of heads, and windows of the last layers."""

from __future__ import annotations

import pytest

from megalard.errors import UserError
from tests.model.families.configs import flags_of, spec_of


def test_qwen2_has_biases_on_q_k_and_v_alone():
    assert flags_of("qwen2") == (True, False, False, None, "before")


def test_qwen3_has_a_norm_of_each_head():
    assert flags_of("qwen3") == (False, False, False, "head", "before")
    assert flags_of("qwen3", attention_bias=True) == (True, True, False, "head", "before")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_are_of_the_layers_after_max_window_layers(family):
    windowed = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
    assert spec_of(family, **windowed).windows == (None, None, None, 5)
    assert spec_of(family, **windowed | {"use_sliding_window": False}).windows == (None,) * 4


def test_layer_types_decide_over_max_window_layers():
    kinds = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    spec = spec_of("qwen3", use_sliding_window=True, sliding_window=5, layer_types=kinds)
    assert spec.windows == (5, None, None, None)


def test_types_that_the_decoder_has_no_attention_for_are_refused():
    kinds = ["full_attention"] * 3 + ["chunked_attention"]
    with pytest.raises(UserError, match="its layer_types hold 'chunked_attention'"):
        spec_of("qwen3", layer_types=kinds)
