"""Mistral's and Ministral's windows."""

from __future__ import annotations

import pytest

from megalard.errors import UserError
from tests.model.families.configs import flags_of, spec_of

KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize("family", ["mistral", "ministral"])
def test_there_are_no_biases(family):
    changes = {"layer_types": KINDS, "sliding_window": 9} if family == "ministral" else {}
    assert flags_of(family, **changes) == (False, False, False, None, "before")


def test_all_layers_of_mistral_have_the_window():
    assert spec_of("mistral", sliding_window=7).windows == (7, 7, 7, 7)
    assert spec_of("mistral", sliding_window=None).windows == (None,) * 4


def test_a_window_without_any_token_is_refused():
    with pytest.raises(UserError, match="its sliding_window is 0, so that no token sees another"):
        spec_of("mistral", sliding_window=0)


def test_layers_of_ministral_have_the_window_by_their_type():
    spec = spec_of("ministral", layer_types=KINDS, sliding_window=9)
    assert spec.windows == (9, None, None, 9)
    assert spec.family == "ministral"


def test_mistral_with_layer_types_is_ministral_as_in_transformers():
    spec = spec_of("mistral", layer_types=KINDS, sliding_window=9)
    assert (spec.family, spec.windows) == ("ministral", (9, None, None, 9))


def test_types_without_a_window_are_refused():
    with pytest.raises(UserError, match="has layer_types and no sliding_window"):
        spec_of("ministral", layer_types=KINDS, sliding_window=None)
