"""Build decoders: first without storage, then filled with this rank's slices of the weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from megalard.checkpoint.weights import Weights, is_finite
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.model.parameter_slice import ParameterSlice
from megalard.model.rope import RopeTable, rope_table
from megalard.model.spec import ModelSpec
from megalard.parallel.divided_weights import LayerGathers, WeightDivision
from megalard.parallel.mesh import SINGLE, Axis
from megalard.parallel.ops import ParallelOps
from megalard.parallel.tensor.slices import slice_of_parameter


def empty_decoder(spec: ModelSpec, rope: RopeTable, axis: Axis) -> Decoder:
    """Return a decoder for this rank of the tp axis whose parameters have no storage."""
    slice_of = partial(slice_of_parameter, spec=spec, rank=axis.rank, tp=axis.size)
    with torch.device("meta"):
        return Decoder(spec, rope, ParallelOps(axis), slice_of)


def full_slices(spec: ModelSpec) -> dict[str, ParameterSlice]:
    """Return the slice of every parameter of a model in a single process, by name."""
    return dict(empty_decoder(spec, rope_table(spec), SINGLE).slices)


def load_decoder(
    spec: ModelSpec,
    rope: RopeTable,
    axis: Axis,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    division: WeightDivision | None = None,
) -> Decoder:
    """Return a frozen decoder with weights that are read from disk and cast to ``dtype``.

    Args:
        spec, rope: the shape of the decoder, and its table of rotary positions.
        axis: the tp axis.
        weights: the files.
        device, dtype: those of the weights.
        division: which weights the ranks divide; None keeps this rank's slices whole. A weight is
            divided as soon as it is read, so that the device never holds all of them.

    Raises:
        UserError: a tensor is missing or has another shape than config.json implies.
    """
    decoder = empty_decoder(spec, rope, axis)
    for name in decoder.slices:
        value = read_parameter(decoder, name, weights)
        parameter = make_parameter(decoder, name, value, device, dtype, division)
        set_parameter(decoder, name, parameter)
    if division is not None:
        decoder.weight_sources.append(LayerGathers(decoder))
    return decoder


def make_parameter(
    decoder: Decoder,
    name: str,
    value: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    division: WeightDivision | None,
    is_trained: bool = False,
) -> nn.Parameter:
    """Return a parameter of a decoder with a value; a trained one keeps fp32 values.

    Args:
        value: this rank's slice. A frozen parameter may share its memory.
    """
    if division is not None:
        return division.parameter(name, decoder.slices[name], value, device, dtype, is_trained)
    if is_trained:
        return nn.Parameter(value.to(device, torch.float32, copy=True))
    return nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False)


def read_parameter(decoder: Decoder, name: str, weights: Weights) -> torch.Tensor:
    """Return this rank's slice of a parameter, in the dtype of the files, on the CPU.

    Raises:
        UserError: the tensor is missing, has another shape, or holds NaN or infinity.
    """
    held = decoder.slices[name]
    check_shape(name, held.full_shape, weights)
    value = weights.read(name, held)
    if not is_finite(value):
        raise UserError(
            f"tensor {name} in {weights.directory} holds NaN or infinity: download the model "
            "again, or use another one"
        )
    return value


def check_shape(name: str, expected: tuple[int, ...], weights: Weights) -> None:
    """Refuse a tensor that is missing or has another shape than config.json implies.

    Raises:
        UserError: the tensor does not fit; the message names it.
    """
    shape = weights.shape(name)
    if shape != expected:
        raise UserError(
            f"tensor {name} in {weights.directory} has shape {list(shape)}, but config.json "
            f"implies {list(expected)}: the files do not belong together"
        )


def check_complete(weights: Weights, spec: ModelSpec) -> None:
    """Refuse a model that lacks a tensor or has one in another shape than its config implies.

    Raises:
        UserError: a tensor does not fit; the message names the first one.
    """
    for name, held in full_slices(spec).items():
        check_shape(name, held.full_shape, weights)


def get_parameter(root: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter ``name``."""
    module, last = _module_of(root, name)
    return getattr(module, last)


def set_parameter(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set the parameter ``name``; two models may have the same parameter object."""
    module, last = _module_of(root, name)
    setattr(module, last, parameter)


def _module_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return root.get_submodule(path), last
