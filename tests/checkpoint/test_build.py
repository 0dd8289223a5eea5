"""Decoders are built without storage, then filled with this rank's slices."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megalard.checkpoint.build import (
    check_shape,
    empty_decoder,
    full_slices,
    get_parameter,
    load_decoder,
    set_parameter,
)
from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.model.rope import rope_table
from megalard.model.spec import read_spec
from megalard.parallel.mesh import SINGLE, Axis
from tests.command_line import user_error
from tests.models import make_model

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with biases."""
    return make_model("llama-biases", tmp_path_factory.mktemp("build") / "model")


def test_an_empty_decoder_has_no_storage(model):
    spec = read_spec(model)
    decoder = empty_decoder(spec, rope_table(spec), Axis(None, 1, 2))
    assert all(parameter.is_meta for parameter in decoder.parameters())
    assert decoder.slices[Q_PROJ].local_shape == (16, 32)


def test_the_slices_of_a_model_are_its_tensors(model):
    shapes = {name: tuple(x.shape) for name, x in load_file(model / "model.safetensors").items()}
    slices = full_slices(read_spec(model))
    assert {name: held.full_shape for name, held in slices.items()} == shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_decoder_is_frozen_and_has_the_weights_of_the_files(dtype, model):
    spec, weights = read_spec(model), HuggingFaceWeights(model)
    decoder = load_decoder(spec, rope_table(spec), SINGLE, weights, torch.device("cpu"), dtype)
    expected = load_file(model / "model.safetensors")
    parameters = dict(decoder.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert not parameter.requires_grad and torch.equal(parameter, expected[name].to(dtype))


def test_a_tensor_of_another_shape_is_refused(model):
    weights = HuggingFaceWeights(model)
    check_shape(Q_PROJ, (32, 32), weights)
    assert user_error(check_shape, Q_PROJ, (32, 40), weights) == (
        f"tensor {Q_PROJ} in {model} has shape [32, 32], but config.json implies [32, 40]: the "
        "files do not belong together"
    )


def test_two_models_may_have_the_same_parameter_object(model):
    spec = read_spec(model)
    one, two = (empty_decoder(spec, rope_table(spec), SINGLE) for _ in range(2))
    assert get_parameter(one, Q_PROJ) is not get_parameter(two, Q_PROJ)
    set_parameter(two, Q_PROJ, get_parameter(one, Q_PROJ))
    assert get_parameter(two, Q_PROJ) is one.model.layers[0].self_attn.q_proj.weight
