"""Random models: weights that no file holds, in the shapes of real ones."""

from __future__ import annotations

import pytest
import torch

from megalard.checkpoint.build import check_complete, load_decoder
from megalard.model.rope import rope_table
from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.parallel.tensor.slices import slice_of_parameter
from tools.bench.random_model import RandomWeights, random_decoder, random_spec
from tools.bench.shapes import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_model(shape):
    spec = random_spec(shape, 4096)
    assert spec.max_positions == 4096 and spec.num_layers == SHAPES[shape]["num_hidden_layers"]
    check_complete(RandomWeights(spec, shape), spec)


def test_weights_are_read_by_slice():
    spec = random_spec("tiny", 64)
    weights = RandomWeights(spec, "tiny")
    decoder = load_decoder(spec, rope_table(spec), SINGLE, weights, torch.device("cpu"),
                           torch.float32)  # fmt: skip
    query = decoder.model.layers[0].self_attn.q_proj.weight
    assert 0.015 < query.std() < 0.025 and bool((decoder.model.norm.weight == 1).all())
    name = "model.layers.0.self_attn.q_proj.weight"
    held = slice_of_parameter(name, weights.shape(name), spec, 1, 2)
    assert weights.read(name, held).shape == (128, 256)
    assert weights.files() == []


def test_a_random_decoder_has_the_same_weights_each_time():
    spec, mesh = random_spec("tiny", 64), build_mesh("cpu", 1)
    first, second = (random_decoder(spec, mesh, torch.float32).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
