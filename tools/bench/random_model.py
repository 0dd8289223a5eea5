"""Models of known shapes with random weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from megalard.checkpoint.build import (
    empty_decoder,
    full_slices,
    make_parameter,
    set_parameter,
)
from megalard.model.decoder import Decoder
from megalard.model.parameter_slice import ParameterSlice
from megalard.model.rope import rope_table
from megalard.model.spec import ModelSpec, spec_from_config
from megalard.parallel.divided_weights import LayerGathers, WeightDivision
from megalard.parallel.mesh import Mesh
from tools.bench.shapes import SHAPES

# The spread that the weights of trained models have.
_STANDARD_DEVIATION = 0.02
_NOISE_ELEMENTS = 2**24


def random_config(shape: str, window: int) -> dict:
    """Return the ``config.json`` of a Llama of a known shape.

    Args:
        shape: a name in ``SHAPES``.
        window: the number of positions that the model reads.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SHAPES[shape],
        "max_position_embeddings": window,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def random_spec(shape: str, window: int) -> ModelSpec:
    """Return the spec of ``random_config``."""
    return spec_from_config(random_config(shape, window), shape)


def random_decoder(
    spec: ModelSpec, mesh: Mesh, dtype: torch.dtype, division: WeightDivision | None = None
) -> Decoder:
    """Return a frozen decoder on the device of this rank; its norms are ones."""
    decoder = empty_decoder(spec, rope_table(spec), mesh.tp)
    torch.manual_seed(0)
    for name, held in decoder.slices.items():
        value = torch.empty(held.local_shape, dtype=dtype, device=mesh.device)
        value.fill_(1.0) if _is_norm(name) else value.normal_(0, _STANDARD_DEVIATION)
        parameter = make_parameter(decoder, name, value, mesh.device, dtype, division)
        set_parameter(decoder, name, parameter)
    if division is not None:
        decoder.weight_sources.append(LayerGathers(decoder))
    return decoder


class RandomWeights:
    """Weights in bf16 that no file holds; see ``megalard.checkpoint.weights.Weights``.

    Every tensor repeats the same 16M numbers, so that it takes hardly any time to make. The norms
    are ones.
    """

    def __init__(self, spec: ModelSpec, shape: str):
        self.directory = Path(f"random-{shape}")
        self._slices = full_slices(spec)

    @cached_property
    def _noise(self) -> torch.Tensor:
        noise = torch.randn(_NOISE_ELEMENTS, generator=torch.Generator().manual_seed(0))
        return (noise * _STANDARD_DEVIATION).to(torch.bfloat16)

    def names(self) -> list[str]:
        return list(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._slices[name].full_shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def files(self) -> list[Path]:
        return []

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        shape = self.shape(name) if held is None else held.local_shape
        if _is_norm(name):
            return torch.ones(shape, dtype=torch.bfloat16)
        count = torch.Size(shape).numel()
        return self._noise.repeat(-(-count // _NOISE_ELEMENTS))[:count].view(shape)


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")
