"""RoPE: frequencies against the formulas of the papers, tables against transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megalard.config.schema import RopeConfig
from megalard.errors import UserError
from megalard.model.rope import (
    RopeTable,
    apply_rope,
    is_native,
    rope_table,
    scaled_config,
    window_of,
)
from megalard.model.spec import spec_from_config
from tests.command_line import user_error
from tests.model.ropes import (
    DIM,
    LINEAR,
    NATIVE,
    THETA,
    cos_of_document,
    scaled,
    table_of,
    teacher,
    transformers_cos,
)

TYPES = ("linear", "abf", "yarn", "llama3", "longrope")
# Native window, head dim, theta and factor: a tiny model, Llama 2 and Llama 3.
SHAPES = [(64, 16, 1e4, 8.0), (4096, 128, 1e4, 8.0), (8192, 128, 5e5, 4.0)]


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
    reach = torch.full_like(positions, 256)
    actual = apply_rope(x, *table.cos_sin(positions, reach))
    pairs = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :])
    angle = positions[0, :, None].double() * table.inv_freq.double()
    turned = pairs * torch.polar(torch.full_like(angle, table.attention_scaling), angle)
    # cos and sin are computed in fp32, of angles of up to 255.
    torch.testing.assert_close(actual[..., : DIM // 2], turned.real, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[..., DIM // 2 :], turned.imag, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_tables_are_what_transformers_computes_at_every_length(kind):
    config = scaled(RopeConfig(kind, 4.0))
    table = table_of(config)
    for length in (5, NATIVE, NATIVE + 1, 4 * NATIVE):
        assert torch.equal(cos_of_document(table, length), transformers_cos(config, length)), length


@pytest.mark.parametrize("kind", TYPES)
def test_both_config_spellings_are_equal(kind):
    """Either spelling alone is read as the same RoPE, by megalard and by transformers."""
    config = scaled(RopeConfig(kind, 4.0))
    assert config["max_position_embeddings"] == 4 * NATIVE
    assert config["head_dim"] == DIM
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    read = [spec_from_config(c, "here").rope for c in (config, old, new)]
    assert read[0] == read[1] == read[2] == config["rope_parameters"]
    cos = [transformers_cos(c, 2 * NATIVE) for c in (config, old, new)]
    assert torch.equal(cos[0], cos[1]) and torch.equal(cos[0], cos[2])


def test_abf_takes_a_given_theta():
    table = table_of(scaled(RopeConfig("abf", 8.0, theta=5e5)))
    np.testing.assert_allclose(table.inv_freq, native_frequencies(5e5), rtol=1e-6)


def test_yarn_scales_cos_and_sin():
    table = table_of(scaled(RopeConfig("yarn", 8.0)))
    positions = torch.arange(7)[None]
    cos, sin = table.cos_sin(positions, torch.full_like(positions, 7))
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(8) + 1) ** 2, rtol=1e-5)


def test_longrope_takes_the_given_factors():
    factors = [1.0 + i for i in range(DIM // 2)]
    config = scaled(RopeConfig("longrope", 8.0, long_factors=factors))
    assert config["rope_scaling"]["long_factor"] == config["rope_scaling"]["short_factor"]
    assert config["original_max_position_embeddings"] == NATIVE
    np.testing.assert_allclose(table_of(config).inv_freq, native_frequencies() / factors, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "asked", "advice"),
    [
        ("linear", "yarn", "use rope.type linear to scale it further, or rope.type table"),
        ("yarn", "abf", "use rope.type yarn to scale it further, or rope.type table"),
        ("longrope", "longrope", "use rope.type table, which"),
    ],
)
def test_a_teacher_that_is_scaled_by_another_type_is_refused(kind, asked, advice):
    spec = spec_from_config(scaled(RopeConfig(kind, 2.0)), "teacher")
    with pytest.raises(UserError, match=rf"already scaled \(rope_type '{kind}'\): {advice}"):
        scaled(RopeConfig(asked, 4.0), spec)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_a_teacher_may_be_scaled_further_by_the_same_type(kind):
    """The factors multiply, and the native window stays that of the first scaling."""
    once = spec_from_config(scaled_config(teacher(), RopeConfig(kind, 2.0), NATIVE), "teacher")
    twice = scaled_config(once, RopeConfig(kind, 4.0), 2 * NATIVE)
    directly = scaled_config(teacher(), RopeConfig(kind, 8.0), NATIVE)
    assert twice == directly
    assert twice["max_position_embeddings"] == 8 * NATIVE


def test_a_student_that_is_scaled_while_its_teacher_is_not_is_refused():
    student = teacher(rope_theta=None, rope_parameters={**LINEAR, "rope_theta": THETA})
    with pytest.raises(UserError, match=r"the teacher's is not: keep it with rope.type checkpoint"):
        scaled_config(student, RopeConfig("linear", 2.0), NATIVE, teacher())


def test_a_dynamic_checkpoint_is_refused():
    sentence = user_error(rope_table, teacher(rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
    assert "rope_type 'dynamic' depends on the length that is read" in sentence
    assert sentence.endswith("give a model with another RoPE")


@pytest.mark.parametrize("factors", [[1.0] * 7, [1.0] * 7 + [0.0]])
def test_wrong_long_factors_are_refused(factors):
    with pytest.raises(UserError, match=r"rope.long_factors must be 8 positive numbers"):
        scaled(RopeConfig("longrope", 8.0, long_factors=factors))


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "linear"}, "Missing required keys .*'factor'"),
        ({"rope_type": "spiral", "factor": 2.0}, "cannot build, .* has no 'spiral'"),
        (
            {"rope_type": "yarn", "factor": "x", "original_max_position_embeddings": 32},
            "has 'x' as factor, which must be a finite number",
        ),
        ({"rope_type": "linear", "factor": 0}, "cannot build, .* frequencies are not finite"),
    ],
    ids=str,
)
def test_a_rope_that_transformers_cannot_build_is_refused(rope, reason):
    with pytest.raises(UserError, match=reason) as caught:
        rope_table(teacher(rope_parameters=rope, rope_scaling=rope))
    assert str(caught.value).endswith("correct it, or download it again")


def longrope(long: list, short: list, attention_factor: float | None = None, **changes) -> dict:
    """Return the config.json of a Llama with longrope from NATIVE to 4 * NATIVE positions."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "factor": 4.0,
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": NATIVE,
    }
    if attention_factor is not None:
        rope["attention_factor"] = attention_factor
    return teacher(
        rope_theta=None,
        rope_parameters=rope,
        max_position_embeddings=4 * NATIVE,
        original_max_position_embeddings=NATIVE,
        **changes,
    ).hf_config


def test_longrope_has_other_frequencies_for_long_documents():
    """The choice is by document: a short one in a block with a long one keeps its frequencies."""
    long, short = [1.0 + i for i in range(DIM // 2)], [1.0 + i / 8 for i in range(DIM // 2)]
    config = longrope(long, short)
    table = table_of(config)
    np.testing.assert_allclose(table.inv_freq, native_frequencies() / short, rtol=1e-6)
    np.testing.assert_allclose(table.long_inv_freq, native_frequencies() / long, rtol=1e-6)
    for length in (NATIVE, NATIVE + 1, 4 * NATIVE):
        assert torch.equal(cos_of_document(table, length), transformers_cos(config, length)), length
    lengths = (NATIVE, 2 * NATIVE)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    reaches = torch.cat([torch.full((n,), n) for n in lengths])[None]
    cos, _ = table.cos_sin(positions, reaches)
    expected = torch.cat([transformers_cos(config, n) for n in lengths])
    assert torch.equal(cos[0, 0], expected)


def test_vectors_in_bf16_are_rotated_in_fp32_and_rounded_once():
    x, angles = torch.randn(1, 2, 64, 8).bfloat16(), torch.randn(1, 1, 64, 4).repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.double().chunk(2, dim=-1)
    exact = x.double() * cos + torch.cat((-b, a), dim=-1) * sin
    # Half of a step of bf16, and the rounding of fp32.
    error = (apply_rope(x, cos, sin).double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8 + 1e-6).all())


def test_tables_are_the_same_if_they_rotate_alike():
    factors, other = [2.0] * (DIM // 2), [2.0] * (DIM // 2 - 1) + [3.0]
    table = table_of(longrope(factors, other))
    assert table.same_as(table_of(longrope(factors, other)))
    assert not table.same_as(table_of(longrope(other, other)))
    assert not table.same_as(table_of(longrope(other, factors)))
    assert not table.same_as(table_of(longrope(factors, other, attention_factor=1.0)))
    assert not table.same_as(rope_table(teacher()))


def test_an_unscaled_rope_is_native_by_any_name():
    ones, twos = [1.0] * (DIM // 2), [2.0] * (DIM // 2)
    assert is_native(teacher())
    assert is_native(teacher(rope_scaling={**LINEAR, "factor": 1.0}))
    assert is_native(spec_from_config(longrope(ones, ones, attention_factor=1.0), "here"))
    assert not is_native(spec_from_config(longrope(twos, ones, attention_factor=1.0), "here"))
    assert not is_native(spec_from_config(longrope(ones, ones, attention_factor=1.5), "here"))
    assert not is_native(teacher(rope_scaling=LINEAR))


def test_the_window_of_a_model_is_what_its_scaling_gives():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": NATIVE}
    assert window_of(teacher()) == NATIVE
    # config.json of Qwen2.5 names the window before scaling, Llama 3.1's the window after it.
    assert window_of(teacher(rope_scaling=yarn)) == 4 * NATIVE
    assert window_of(teacher(rope_scaling=yarn, max_position_embeddings=300)) == 300
    assert window_of(teacher(rope_scaling=LINEAR)) == NATIVE
    assert window_of(teacher(rope_scaling=LINEAR), native_window=NATIVE) == 2 * NATIVE


def test_only_the_rotary_features_of_a_head_turn():
    """Phi-4-mini turns the first part of each head."""
    x = torch.randn(1, 1, 3, 12)
    positions = torch.arange(3)[None]
    table = rope_table(phi3())
    cos, sin = table.cos_sin(positions, torch.full_like(positions, 3))
    assert cos.shape[-1] == 8
    turned = apply_rope(x, cos, sin)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[..., :8], apply_rope(x[..., :8], cos, sin))
    assert not torch.equal(turned[..., :8], x[..., :8])


def phi3():
    """Return the spec of a Phi-3 whose heads have 12 features, 8 of which turn."""
    config = {
        "model_type": "phi3",
        "vocab_size": 67,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": NATIVE,
        "original_max_position_embeddings": NATIVE,
        "partial_rotary_factor": 2 / 3,
        "pad_token_id": 0,
    }
    return spec_from_config(config, "phi")


def test_a_family_that_cannot_describe_a_type_is_refused():
    with pytest.raises(
        UserError, match=r"rope.type is yarn, which config.json of a phi3 model .* abf or longrope"
    ):
        scaled(RopeConfig("yarn", 4.0), phi3())
    config = scaled(RopeConfig("longrope", 4.0), phi3())
    assert config["rope_scaling"] == {
        "type": "longrope",
        "short_factor": [4.0] * 4,
        "long_factor": [4.0] * 4,
    }


def test_tables_are_the_same_if_they_rotate_alike_at_every_length():
    short, long = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.25])
    table = RopeTable(short, 1.0, long, 64)
    assert table.same_as(RopeTable(short.clone(), 1.0, long.clone(), 64))
    for other in (
        RopeTable(short, 1.0, long, 128),
        RopeTable(short, 1.5, long, 64),
        RopeTable(short, 1.0, short, 64),
        RopeTable(long, 1.0, long, 64),
        RopeTable(short, 1.0),
    ):
        assert not table.same_as(other) and not other.same_as(table)
    # Without other frequencies for long documents it does not matter where they begin.
    assert RopeTable(short, 1.0).same_as(RopeTable(short, 1.0, None, 64))
