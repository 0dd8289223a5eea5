"""Making decoders: without storage first, then filled with this rank's slices."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from megalard.checkpoint.weights import Weights
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.model.rope import RopeTable
from megalard.model.spec import ModelSpec
from megalard.parallel.mesh import Axis
from megalard.parallel.tensor.layout import parameter_layout
from megalard.parallel.tensor.linear import TensorParallel


def empty_decoder(spec: ModelSpec, rope: RopeTable, axis: Axis) -> Decoder:
    """A decoder for this rank of the tp ``axis``, its parameters without storage."""
    layout = partial(parameter_layout, spec=spec, rank=axis.rank, tp=axis.size)
    with torch.device("meta"):
        return Decoder(spec, rope, TensorParallel(axis), layout)


def load_decoder(
    spec: ModelSpec,
    rope: RopeTable,
    axis: Axis,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
) -> Decoder:
    """A frozen decoder with the weights of a model directory, cast to ``dtype``.

    Raises:
        UserError: a tensor is missing or has another shape than config.json implies.
    """
    decoder = empty_decoder(spec, rope, axis)
    for name in decoder.layouts:
        tensor = read_parameter(decoder, name, weights).to(device=device, dtype=dtype)
        set_parameter(decoder, name, nn.Parameter(tensor, requires_grad=False))
    return decoder


def read_parameter(decoder: Decoder, name: str, weights: Weights) -> torch.Tensor:
    """This rank's slice of a parameter from the files, in their dtype, on the CPU."""
    layout = decoder.layouts[name]
    shape = weights.shape(name)
    if shape != layout.full_shape:
        raise UserError(
            f"tensor {name} in {weights.directory} has shape {list(shape)}, but config.json "
            f"implies {list(layout.full_shape)}: the files do not belong together"
        )
    return weights.read(name, layout)


def get_module(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter ``name``, and the parameter's name in it."""
    path, _, last = name.rpartition(".")
    return root.get_submodule(path), last


def set_parameter(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put ``parameter`` in the place ``name``; two models may hold the same object."""
    module, last = get_module(root, name)
    setattr(module, last, parameter)
