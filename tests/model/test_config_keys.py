"""Every key that the configuration classes of transformers know is accounted for."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import CONFIG_MAPPING

from megalard.model.families import FAMILIES
from megalard.model.families.family import READ, REQUIRED, WITHOUT_EFFECT


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_the_class_is_in_one_of_the_three_sets(name):
    """A key that a new transformers adds is named here, before it changes logits unseen."""
    family = FAMILIES[name]
    keys = [field.name for field in dataclasses.fields(CONFIG_MAPPING[name])]
    assert len(keys) > 20
    assert [key for key in keys if not family.knows(key)] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_no_key_is_in_two_sets(name):
    family = FAMILIES[name]
    read = READ | family.read
    without_effect = {*WITHOUT_EFFECT, *family.without_effect}
    assert read & without_effect == set()
    assert set(family.required_values()) & (read | without_effect) == set()
    # What a family reads, it may take at any value although other families refuse it.
    assert set(REQUIRED) - set(family.required_values()) == set(REQUIRED) & family.read


@pytest.mark.parametrize("name", FAMILIES)
def test_the_keys_that_a_family_reads_are_keys_of_its_class(name):
    family, kind = FAMILIES[name], CONFIG_MAPPING[name]
    old = {"partial_rotary_factor"}  # transformers 5 has it among the RoPE parameters.
    assert family.read - old <= {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_required_values_are_the_defaults_of_the_class(name):
    """A file that leaves such a key out is not refused by mistake, or read wrongly."""
    pad = {"pad_token_id": 0} if name == "phi3" else {}
    config = CONFIG_MAPPING[name](**pad).to_dict()
    for key, value in FAMILIES[name].required_values().items():
        default = config.get(key)
        assert default is None or default == value or (not default and not value), key
