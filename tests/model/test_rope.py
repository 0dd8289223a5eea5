"""RoPE: frequencies against the formulas of the papers, both spellings, and bad tables."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalard.config.schema import RopeConfig
from megalard.errors import UserError
from megalard.model.rope import apply_rope, read_table, rope_table, scaled_config
from megalard.model.spec import rope_parameters, spec_from_config
from tests.command_line import user_error

NATIVE, THETA, DIM = 64, 10000.0, 16
TYPES = ("linear", "abf", "yarn", "llama3", "longrope")
# Native window, head dim, theta and factor: a tiny model, Llama 2 and Llama 3.
SHAPES = [(64, 16, 1e4, 8.0), (4096, 128, 1e4, 8.0), (8192, 128, 5e5, 4.0)]


def teacher(native: int = NATIVE, dim: int = DIM, theta: float = THETA, **changes):
    """Return the spec of a teacher with four heads."""
    config = {
        "model_type": "llama",
        "vocab_size": 67,
        "hidden_size": 4 * dim,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": native,
        "rope_theta": theta,
    }
    return spec_from_config(config | changes, "teacher")


def scaled(rope: RopeConfig, spec=None) -> dict:
    """Return the config.json of a student."""
    return scaled_config(spec or teacher(), rope, NATIVE)


def table_of(config: dict):
    """Return the table of a config.json."""
    return rope_table(spec_from_config(config, "student"))


def native_frequencies(theta: float = THETA, dim: int = DIM) -> np.ndarray:
    """Return theta^(-2i/d) (Su et al., arXiv 2104.09864)."""
    return theta ** -(np.arange(0, dim, 2) / dim)


def linear_frequencies(native: int, dim: int, theta: float, factor: float) -> np.ndarray:
    """Position interpolation (Chen et al., arXiv 2306.15595): all positions divided by f."""
    return native_frequencies(theta, dim) / factor


def ntk_frequencies(native: int, dim: int, theta: float, factor: float) -> np.ndarray:
    """NTK-aware scaling: another theta, for which the slowest pair is interpolated by f."""
    return native_frequencies(theta * factor ** (dim / (dim - 2)), dim)


def yarn_frequencies(native: int, dim: int, theta: float, factor: float) -> np.ndarray:
    """YaRN (Peng et al., arXiv 2309.00071): a ramp from native to interpolated frequencies.

    The ramp runs over the pairs from the pair that turns 32 times in the native window to the pair
    that turns once, as in the authors' code.
    """

    def pair_that_turns(times: float) -> float:
        return dim * math.log(native / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(32)), 0)
    high = min(math.ceil(pair_that_turns(1)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    frequencies = native_frequencies(theta, dim)
    return frequencies * (1 - ramp) + frequencies / factor * ramp


def llama3_frequencies(native: int, dim: int, theta: float, factor: float) -> np.ndarray:
    """Llama 3.1: by wavelength; native below M/4, interpolated above M, and smooth between."""
    frequencies = native_frequencies(theta, dim)
    turns = native * frequencies / (2 * math.pi)
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


FORMULAS = {
    "linear": (linear_frequencies, lambda native, factor: 1.0),
    "abf": (ntk_frequencies, lambda native, factor: 1.0),
    "yarn": (yarn_frequencies, lambda native, factor: 0.1 * math.log(factor) + 1),
    "llama3": (llama3_frequencies, lambda native, factor: 1.0),
    "longrope": (
        linear_frequencies,
        lambda native, factor: math.sqrt(1 + math.log(factor) / math.log(native)),
    ),
}


@pytest.mark.parametrize(("native", "dim", "theta", "factor"), SHAPES)
@pytest.mark.parametrize("kind", TYPES)
def test_frequencies_are_those_of_the_formula(kind, native, dim, theta, factor):
    frequencies, scaling = FORMULAS[kind]
    config = scaled_config(teacher(native, dim, theta), RopeConfig(kind, factor), native)
    table = table_of(config)
    expected = frequencies(native, dim, theta, factor)
    # transformers computes in fp32; powers of theta lose some digits.
    np.testing.assert_allclose(table.inv_freq.double(), expected, rtol=2e-5)
    assert table.attention_scaling == pytest.approx(scaling(native, factor))
    assert config["max_position_embeddings"] == native * factor


def test_the_native_table_is_that_of_the_formula():
    np.testing.assert_allclose(rope_table(teacher()).inv_freq, native_frequencies(), rtol=1e-6)


def test_rope_rotates_pairs_by_position_times_frequency():
    """The pair (i, i + d/2) is a complex number that is turned and scaled."""
    x = torch.randn(1, 2, 5, DIM, dtype=torch.float64)
    config = scaled(RopeConfig("yarn", 4.0))
    table, positions = table_of(config), torch.tensor([[0, 1, 7, 63, 255]])
    actual = apply_rope(x, *table.cos_sin(positions))
    pairs = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :])
    angle = positions[0, :, None].double() * table.inv_freq.double()
    turned = pairs * torch.polar(torch.full_like(angle, table.attention_scaling), angle)
    # cos and sin are computed in fp32, of angles of up to 255.
    torch.testing.assert_close(actual[..., : DIM // 2], turned.real, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[..., DIM // 2 :], turned.imag, rtol=1e-4, atol=1e-4)


def transformers_cos(config: dict, length: int) -> torch.Tensor:
    """Return cos [length, head_dim] as transformers computes it for ``length`` tokens."""
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
    """Either spelling alone is read as the same RoPE, by megalard and by transformers."""
    config = scaled(RopeConfig(kind, 4.0))
    assert config["max_position_embeddings"] == 4 * NATIVE
    assert config["head_dim"] == DIM
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    read = [rope_parameters(c, "here") for c in (config, old, new)]
    assert read[0] == read[1] == read[2] == config["rope_parameters"]
    cos = [transformers_cos(c, 2 * NATIVE) for c in (config, old, new)]
    assert torch.equal(cos[0], cos[1]) and torch.equal(cos[0], cos[2])


def test_abf_takes_a_given_theta():
    table = table_of(scaled(RopeConfig("abf", 8.0, theta=5e5)))
    np.testing.assert_allclose(table.inv_freq, native_frequencies(5e5), rtol=1e-6)


def test_yarn_scales_cos_and_sin():
    table = table_of(scaled(RopeConfig("yarn", 8.0)))
    cos, sin = table.cos_sin(torch.arange(7)[None])
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(8) + 1) ** 2, rtol=1e-5)


def test_longrope_takes_the_given_factors():
    factors = [1.0 + i for i in range(DIM // 2)]
    config = scaled(RopeConfig("longrope", 8.0, long_factors=factors))
    assert config["rope_scaling"]["long_factor"] == config["rope_scaling"]["short_factor"]
    assert config["original_max_position_embeddings"] == NATIVE
    np.testing.assert_allclose(table_of(config).inv_freq, native_frequencies() / factors, rtol=1e-6)


HYBRID = native_frequencies() / [1, 1, 1, 2.5, 3, 8, 8, 8]


def save_table(folder, suffix: str, values=HYBRID) -> str:
    """Write inverse frequencies in the format of a suffix; return the path."""
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
    sentence = user_error(rope_table, teacher(rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
    assert "rope_type 'dynamic' depends on the length that is read" in sentence
    assert sentence.endswith("give a model with another RoPE")


@pytest.mark.parametrize("factors", [[1.0] * 7, [1.0] * 7 + [0.0]])
def test_wrong_long_factors_are_refused(factors):
    with pytest.raises(UserError, match=r"rope.long_factors must be 8 positive numbers"):
        scaled(RopeConfig("longrope", 8.0, long_factors=factors))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear"},
        {"rope_type": "spiral", "factor": 2.0},
        {"rope_type": "yarn", "factor": "x", "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 0},
    ],
    ids=str,
)
def test_a_rope_that_transformers_cannot_build_is_refused(rope):
    sentence = user_error(rope_table, teacher(rope_parameters=rope, rope_scaling=rope))
    assert "describes a RoPE that transformers cannot build" in sentence
    assert sentence.endswith("correct it, or download it again")


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
