"""The two spellings of RoPE in config.json, against the configuration class of transformers."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from megalard.errors import UserError
from megalard.model.spec import spec_from_config
from tests.model.ropes import LINEAR, teacher


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {**LINEAR, "rope_theta": 5e5},
        ),
        ({"rope_scaling": LINEAR}, {**LINEAR, "rope_theta": 10000.0}),
        ({"rope_parameters": {**LINEAR, "rope_theta": 7.0}}, {**LINEAR, "rope_theta": 7.0}),
        (
            {"rope_parameters": LINEAR, "rope_theta": 7.0, "rope_scaling": LINEAR},
            {**LINEAR, "rope_theta": 7.0},
        ),
    ],
)
def test_either_spelling_is_read_as_transformers_reads_it(config, expected):
    config = {
        key: value for key, value in teacher().hf_config.items() if key != "rope_theta"
    } | config
    assert spec_from_config(config, "here").rope == expected
    theirs = LlamaConfig(**json.loads(json.dumps(config))).rope_parameters
    assert {key: theirs[key] for key in expected} == expected


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {**LINEAR, "rope_theta": 7.0}, "rope_theta": 7.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR},
        {"rope_parameters": LINEAR, "rope_scaling": {**LINEAR, "factor": 4.0}},
    ],
)
def test_spellings_that_disagree_are_refused(config):
    with pytest.raises(UserError, match="describes RoPE twice and differently"):
        teacher(**config)
