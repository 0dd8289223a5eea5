"""The config.json that is written: RoPE in both spellings, and lengths of the student's window."""

from __future__ import annotations

import pytest

from megalard.model.export_config import export_config
from megalard.model.spec import spec_from_config
from tests.model.families.configs import BASE, spec_of

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
# What vLLM and other tools take for the longest text.
LENGTH_KEYS = (
    *("n_positions", "n_ctx", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *("max_target_positions", "model_max_length", "seq_length", "seq_len"),
)


def test_the_other_keys_are_kept():
    config = export_config(spec_of("llama", bos_token_id=7, a_new_key=[1]))
    assert config["bos_token_id"] == 7 and config["a_new_key"] == [1]
    for key, value in BASE.items():
        assert config[key] == value


def test_rope_is_written_in_both_spellings():
    """transformers 4.57 silently reads a file with only rope_parameters as native RoPE."""
    config = export_config(spec_of("llama"), LINEAR, 256)
    assert config["rope_parameters"] == LINEAR
    assert config["rope_theta"] == 1e4
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["max_position_embeddings"] == 256


def test_no_scaling_is_left_over():
    spec = spec_of("llama", rope_scaling={"type": "yarn", "factor": 2.0}, rope_theta=5e5)
    config = export_config(spec, {"rope_type": "default", "rope_theta": 7e5}, 64)
    assert config["rope_scaling"] is None
    assert config["rope_theta"] == 7e5
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 7e5}


def test_what_follows_from_the_files_is_written_out():
    """Others need not derive the size of a head, or know which class reads the file."""
    config = export_config(spec_of("llama"))
    assert (config["head_dim"], config["tie_word_embeddings"]) == (8, False)
    kinds = ["sliding_attention"] * 4
    ministral = spec_of("mistral", layer_types=kinds, sliding_window=5)
    assert export_config(ministral)["model_type"] == "ministral"


def test_code_in_the_directory_is_not_named():
    spec = spec_of("llama", auto_map={"AutoModelForCausalLM": "modeling.Custom"})
    assert "auto_map" not in export_config(spec)


@pytest.mark.parametrize("key", LENGTH_KEYS)
def test_a_length_below_the_window_is_raised(key):
    for length in (64, 32):
        assert export_config(spec_of("llama", **{key: length}), window=256)[key] == 256
    assert export_config(spec_of("llama", **{key: 1000}), window=256)[key] == 1000
    assert export_config(spec_of("llama", **{key: "64"}), window=256)[key] == "64"


def test_the_length_of_generation_is_raised_if_it_is_the_window():
    assert export_config(spec_of("llama", max_length=64), window=256)["max_length"] == 256
    assert export_config(spec_of("llama", max_length=20), window=256)["max_length"] == 20


def test_longrope_of_phi3_is_written_as_its_class_reads_it():
    phi = spec_of("phi3", pad_token_id=0, partial_rotary_factor=0.5)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0, 2.0],
        "long_factor": [3.0, 4.0],
        "original_max_position_embeddings": 64,
    }
    config = export_config(phi, rope, 256)
    assert config["rope_scaling"] == {
        "type": "longrope",
        "short_factor": [1.0, 2.0],
        "long_factor": [3.0, 4.0],
    }
    assert config["original_max_position_embeddings"] == 64
    assert config["partial_rotary_factor"] == 0.5
    assert spec_from_config(config, "here").rotary_dim == 4
