"""A family sorts keys into three sets, and reads windows off layer types."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megalard.model.families.family import Family, windows_of

FAMILY = Family(
    "made-up",
    flags=lambda config: {},
    read=frozenset({"partial_rotary_factor", "sliding_window"}),
    without_effect={"mascot": "nothing reads it"},
    required={"logit_scale": 1.0},
)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("hidden_size", "read"),
        ("sliding_window", "read"),
        ("use_cache", "without effect"),
        ("mascot", "without effect"),
        ("logit_scale", "required"),
        ("num_experts", "required"),
        # Required of other families, read by this one.
        ("partial_rotary_factor", "read"),
        ("invented", "unknown"),
    ],
)
def test_a_key_is_in_one_set(key, kind):
    assert FAMILY.reads(key) == (kind == "read")
    assert FAMILY.has_no_effect(key) == (kind == "without effect")
    assert (key in FAMILY.required_values()) == (kind == "required")
    assert FAMILY.lists(key) == (kind != "unknown")


def test_windows_are_read_off_layer_types():
    config = SimpleNamespace(
        sliding_window=4, layer_types=["full_attention", "sliding_attention", "full_attention"]
    )
    assert windows_of(config) == {"windows": (None, 4, None)}
    config.sliding_window = None
    with pytest.raises(ValueError, match="'sliding_attention', but it has no sliding_window"):
        windows_of(config)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layer_types hold 'linear_attention'"):
        windows_of(config)
