"""RoPE: the tables are transformers', both config spellings hold them, bad ones are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalard.config.schema import RopeConfig
from megalard.errors import UserError
from megalard.model.rope import read_table, rope_table, scaled_config
from megalard.model.spec import rope_parameters, spec_from_config

NATIVE, THETA, DIM = 64, 10000.0, 16
TYPES = ("linear", "abf", "yarn", "llama3", "longrope")


def teacher(**changes):
    config = {
        "model_type": "llama",
        "vocab_size": 67,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": NATIVE,
        "rope_theta": THETA,
    }
    return spec_from_config(config | changes, "teacher")


def scaled(rope: RopeConfig, spec=None) -> dict:
    return scaled_config(spec or teacher(), rope, NATIVE)


def table_of(config: dict):
    return rope_table(spec_from_config(config, "student"))


def native_frequencies(theta: float = THETA) -> np.ndarray:
    return theta ** -(np.arange(0, DIM, 2) / DIM)


def transformers_cos(config: dict, length: int) -> torch.Tensor:
    """cos [length, head_dim] as transformers computes it when it reads ``length`` tokens."""
    embedding = LlamaRotaryEmbedding(LlamaConfig(**config))
    return embedding(torch.zeros(1), torch.arange(length)[None])[0][0]


@pytest.mark.parametrize("kind", TYPES)
def test_tables_are_what_transformers_computes_at_every_length(kind):
    config = scaled(RopeConfig(kind, 4.0))
    table = table_of(config)
    for length in (5, NATIVE, NATIVE + 1, 4 * NATIVE):
        cos, _ = table.cos_sin(torch.arange(length)[None])
        assert torch.equal(cos[0, 0], transformers_cos(config, length)), length


@pytest.mark.parametrize("kind", TYPES)
def test_both_config_spellings_are_equal(kind):
    """Either spelling alone is read as the same RoPE, by us and by transformers."""
    config = scaled(RopeConfig(kind, 4.0))
    assert config["max_position_embeddings"] == 4 * NATIVE
    assert config["head_dim"] == DIM
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    read = [rope_parameters(c, "here") for c in (config, old, new)]
    assert read[0] == read[1] == read[2] == config["rope_parameters"]
    cos = [transformers_cos(c, 2 * NATIVE) for c in (config, old, new)]
    assert torch.equal(cos[0], cos[1]) and torch.equal(cos[0], cos[2])


def test_linear_divides_every_frequency():
    table = table_of(scaled(RopeConfig("linear", 8.0)))
    np.testing.assert_allclose(table.inv_freq, native_frequencies() / 8, rtol=1e-6)
    assert table.attention_scaling == 1


def test_abf_takes_the_ntk_aware_theta_by_default():
    config = scaled(RopeConfig("abf", 8.0))
    assert config["rope_theta"] == pytest.approx(THETA * 8 ** (DIM / (DIM - 2)))
    frequencies = table_of(config).inv_freq
    # the slowest pair is interpolated by the factor, the fastest stays
    assert native_frequencies()[-1] / frequencies[-1].item() == pytest.approx(8, rel=1e-5)
    assert frequencies[0] == 1
    given = table_of(scaled(RopeConfig("abf", 8.0, theta=5e5)))
    np.testing.assert_allclose(given.inv_freq, native_frequencies(5e5), rtol=1e-6)


def test_yarn_and_longrope_scale_cos_and_sin():
    yarn = table_of(scaled(RopeConfig("yarn", 8.0)))
    assert yarn.attention_scaling == pytest.approx(0.1 * np.log(8) + 1)
    longrope = table_of(scaled(RopeConfig("longrope", 8.0)))
    assert longrope.attention_scaling == pytest.approx(np.sqrt(1 + np.log(8) / np.log(NATIVE)))
    cos, sin = yarn.cos_sin(torch.arange(7)[None])
    np.testing.assert_allclose(cos**2 + sin**2, yarn.attention_scaling**2, rtol=1e-5)


def test_longrope_takes_the_factors_given():
    factors = [1.0 + i for i in range(DIM // 2)]
    config = scaled(RopeConfig("longrope", 8.0, long_factors=factors))
    assert config["rope_scaling"]["long_factor"] == config["rope_scaling"]["short_factor"]
    assert config["original_max_position_embeddings"] == NATIVE
    np.testing.assert_allclose(table_of(config).inv_freq, native_frequencies() / factors, rtol=1e-6)


HYBRID = native_frequencies() / [1, 1, 1, 2.5, 3, 8, 8, 8]


def save_table(folder, suffix: str, values=HYBRID) -> str:
    path = folder / f"table{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(np.asarray(values).tolist()))
    elif suffix == ".npy":
        np.save(path, values)
    else:
        np.savetxt(path, values)
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".npy", ".txt"])
def test_a_table_is_exported_with_the_frequencies_it_was_trained_with(suffix, tmp_path):
    path = save_table(tmp_path, suffix)
    np.testing.assert_array_equal(read_table(path, DIM), HYBRID)
    config = json.loads(json.dumps(scaled(RopeConfig("table", 8.0, table=path))))
    rope = config["rope_parameters"]
    assert rope["rope_type"] == "longrope" and rope["attention_factor"] == 1
    assert rope["short_factor"] == rope["long_factor"]
    table = table_of(config)
    np.testing.assert_allclose(table.inv_freq, HYBRID, rtol=2e-7)
    assert table.attention_scaling == 1
    for length in (NATIVE // 2, 8 * NATIVE):
        cos, _ = table.cos_sin(torch.arange(length)[None])
        assert torch.equal(cos[0, 0], transformers_cos(config, length))


def test_a_table_replaces_any_scaling_of_the_teacher(tmp_path):
    spec = teacher(rope_scaling={"rope_type": "linear", "factor": 2.0})
    config = scaled(RopeConfig("table", 8.0, table=save_table(tmp_path, ".json")), spec)
    np.testing.assert_allclose(table_of(config).inv_freq, HYBRID, rtol=2e-7)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (HYBRID[:-1], r"has 7 inverse frequencies .* needs 8 \(head_dim / 2\)"),
        ([HYBRID, HYBRID], "has 16 inverse frequencies"),
        ([*HYBRID[:-1], 0], "finite and positive"),
        ([*HYBRID[:-1], float("nan")], "finite and positive"),
    ],
)
def test_a_wrong_table_is_refused(values, sentence, tmp_path):
    path = save_table(tmp_path, ".npy", np.asarray(values))
    with pytest.raises(UserError, match=sentence):
        scaled(RopeConfig("table", 8.0, table=path))


@pytest.mark.parametrize("suffix", [".json", ".npy", ".txt"])
def test_an_unreadable_table_is_refused(suffix, tmp_path):
    missing = tmp_path / f"missing{suffix}"
    with pytest.raises(UserError, match="cannot read inverse frequencies"):
        read_table(str(missing), DIM)
    missing.write_text("{ not it")
    with pytest.raises(UserError, match="cannot read inverse frequencies"):
        read_table(str(missing), DIM)


def test_a_teacher_that_is_already_scaled_is_refused():
    spec = teacher(rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(UserError, match=r"already scaled .*'linear'.* rope.type table"):
        scaled(RopeConfig("linear", 8.0), spec)


def test_a_dynamic_checkpoint_is_refused():
    with pytest.raises(UserError, match="'dynamic' RoPE changes with the length"):
        rope_table(teacher(rope_scaling={"rope_type": "dynamic", "factor": 2.0}))


@pytest.mark.parametrize("factors", [[1.0] * 7, [1.0] * 7 + [0.0]])
def test_wrong_long_factors_are_refused(factors):
    with pytest.raises(UserError, match=r"rope.long_factors must be 8 positive numbers"):
        scaled(RopeConfig("longrope", 8.0, long_factors=factors))


LINEAR = {"rope_type": "linear", "factor": 2.0}


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
    assert rope_parameters(config, "here") == expected
    theirs = LlamaConfig(**json.loads(json.dumps(config))).rope_parameters
    assert {key: theirs[key] for key in expected} == expected


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {**LINEAR, "rope_theta": 7.0}, "rope_theta": 7.0},
        {"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR},
        {"rope_parameters": LINEAR, "rope_scaling": {**LINEAR, "factor": 4.0}},
    ],
)
def test_spellings_that_disagree_are_refused(config):
    with pytest.raises(UserError, match="describes RoPE twice and differently"):
        rope_parameters(config, "here")
