"""OLMo 2's flags: norms after the sublayers, and of q and k over their full width."""

from __future__ import annotations

from tests.model.families.configs import flags_of, spec_of


def test_norms_are_after_the_sublayers_and_over_the_full_width():
    assert flags_of("olmo2") == (False, False, False, "full", "after")
    assert flags_of("olmo2", attention_bias=True) == (True, True, False, "full", "after")
    assert spec_of("olmo2").windows == (None,) * 4
