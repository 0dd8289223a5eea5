"""The trained tensors of one rank, and the bytes of their masters, moments and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from megalard.config.schema import ParallelConfig
from megalard.estimate.sizes import FP32_BYTES
from megalard.model.names import ParameterName


@dataclass(frozen=True)
class TrainedTensor:
    """A trained tensor as one rank holds it.

    Attributes:
        shape: the shape of the rank's slice.
        holders: the number of ranks that hold the slice: those of dp and cp, times its replicas.
        is_divided: whether master, moments and gradient are divided over the holders. The slice
            then also exists in the compute dtype, on every holder.
        has_rows: whether each holder has only its rows in the compute dtype.
    """

    shape: tuple[int, ...]
    holders: int
    is_divided: bool
    has_rows: bool = False

    @property
    def elements(self) -> int:
        """The number of elements of the slice."""
        return prod(self.shape)

    @property
    def share(self) -> int:
        """The elements whose master this rank has: of equally many rows on each holder."""
        if not self.is_divided:
            return self.elements
        return -(-self.shape[0] // self.holders) * prod(self.shape[1:])


@dataclass(frozen=True)
class Trained:
    """The trained tensors of a stage on one rank.

    Attributes:
        tensors: name to tensor, in the order of the forward pass.
        rank: the rank of LoRA pairs; 0 if there are none.
    """

    tensors: Mapping[str, TrainedTensor]
    rank: int

    @cached_property
    def elements(self) -> int:
        """The number of elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def has_embedding(self) -> bool:
        """Whether the embedding is trained."""
        return "embed_tokens" in self.outside_layers()

    @cached_property
    def divided(self) -> Mapping[str, TrainedTensor]:
        """The tensors whose masters are divided or in host memory."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.is_divided}

    def is_divided(self, layer: int | None, module: str, kind: str = "weight") -> bool:
        """Whether a tensor is trained and its master divided or in host memory."""
        tensor = self._by_place.get((layer, module, kind))
        return tensor is not None and tensor.is_divided

    def in_layer(self, layer: int | None) -> Mapping[str, int]:
        """Return the trained weights of a layer: module to number of elements."""
        return self._weights.get(layer, {})

    def lora_in_layer(self, layer: int) -> list[str]:
        """Return the modules of a layer that have a LoRA pair."""
        return self._lora.get(layer, [])

    def outside_layers(self) -> Mapping[str, int]:
        """Return the trained weights of the embedding, the final norm and the head."""
        return self.in_layer(None)

    def names_after(self, layer: int) -> set[str]:
        """Return the tensors whose gradients precede those of a layer in the backward pass."""
        names = set()
        for name, (place, module, _) in zip(self.tensors, self._by_place, strict=True):
            if module != "embed_tokens" and (place is None or place > layer):
                names.add(name)
        return names

    @cached_property
    def _by_place(self) -> dict[tuple[int | None, str, str], TrainedTensor]:
        places = {}
        for name, tensor in self.tensors.items():
            parsed = ParameterName.parse(name)
            places[(parsed.layer, parsed.module, parsed.kind)] = tensor
        return places

    @cached_property
    def _weights(self) -> dict[int | None, dict[str, int]]:
        weights: dict[int | None, dict[str, int]] = {}
        for (layer, module, kind), tensor in self._by_place.items():
            if kind == "weight":
                weights.setdefault(layer, {})[module] = tensor.elements
        return weights

    @cached_property
    def _lora(self) -> dict[int | None, list[str]]:
        modules: dict[int | None, list[str]] = {}
        for layer, module, kind in self._by_place:
            if kind == "lora_A":
                modules.setdefault(layer, []).append(module)
        return modules


@dataclass(frozen=True)
class TrainedState:
    """Bytes of what belongs to the trained tensors of one rank between steps.

    Attributes:
        weights: the weights in the compute dtype whose masters are divided or in host memory.
        masters: fp32 weights on the GPU.
        moments: AdamW's two fp32 moments on the GPU.
        gradients: the summed gradients, which are on the GPU.
        host: masters, moments and fp32 gradients in host memory.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    host: int


def trained_state(trained: Trained, parallel: ParallelConfig, element: int) -> TrainedState:
    """Return the bytes of masters, moments and gradients of trained tensors on one rank.

    Args:
        element: bytes of an element in the compute dtype.
    """
    tensors = trained.tensors.values()
    divided = sum(tensor.share for tensor in tensors if tensor.is_divided)
    whole = sum(tensor.share for tensor in tensors if not tensor.is_divided)
    on_gpu = whole if parallel.offload_optimizer else whole + divided
    return TrainedState(
        weights=element
        * sum(t.share if t.has_rows else t.elements for t in trained.divided.values()),
        masters=FP32_BYTES * on_gpu,
        moments=2 * FP32_BYTES * on_gpu,
        gradients=FP32_BYTES * whole + gradient_bytes(parallel) * divided,
        host=4 * FP32_BYTES * divided if parallel.offload_optimizer else 0,
    )


def gradient_bytes(parallel: ParallelConfig) -> int:
    """Return the bytes of an element of divided gradients."""
    return getattr(torch, parallel.gradient_dtype).itemsize
