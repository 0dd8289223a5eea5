"""A base model with what was trained on it, read as the tensors of one model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from megalard.parallel.layout import Layout


class Weights(Protocol):
    """What a source of a model's tensors can do, whatever its files are like."""

    directory: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def files(self) -> list[Path]: ...

    def read(self, name: str, layout: Layout | None = None) -> torch.Tensor: ...


def trained_parts(name: str, trained: Iterable[str]) -> list[str]:
    """The trained tensors a weight is made of: itself, or LoRA's A and B, or none."""
    stem = name.removesuffix("weight")
    return [part for part in (name, f"{stem}lora_A", f"{stem}lora_B") if part in trained]


def merge_lora(
    original: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """W + scale B A in fp32 on ``lora_a``'s device, rounded to W's dtype."""
    product = lora_b @ lora_a
    product *= scale
    product += original.to(product)
    return product.to(original.dtype)


class MergedWeights:
    """A base with trained weights in place of its own, and LoRA pairs merged into it.

    Args:
        base: the untrained model, whose dtypes the result has.
        trained: fp32 tensors by the base's names, or LoRA's (``...q_proj.lora_A``, ``lora_B``).
        scale: LoRA's alpha / rank.
        tied: whether the head is the embedding; one that stands in the base is then left out, as
            it would no longer be equal to a trained embedding.
    """

    def __init__(self, base: Weights, trained: Weights, scale: float, tied: bool):
        self.base, self.trained, self.scale = base, trained, scale
        self.directory = trained.directory
        self._trained = set(trained.names())
        self._names = [n for n in base.names() if not (tied and n == "lm_head.weight")]

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def files(self) -> list[Path]:
        return [*self.trained.files(), *self.base.files()]

    def read(self, name: str, layout: Layout | None = None) -> torch.Tensor:
        """The tensor, or a rank's slice, in the base's dtype."""
        parts = trained_parts(name, self._trained)
        if not parts:
            return self.base.read(name, layout)
        if parts == [name]:
            return self.trained.read(name, layout).to(self.base.dtype(name))
        # merged whole and then cut: a product of slices may round differently
        lora_a, lora_b = (self.trained.read(part) for part in parts)
        merged = merge_lora(self.base.read(name), lora_a, lora_b, self.scale)
        if layout is None or layout.dim is None:
            return merged
        return merged.narrow(layout.dim, layout.start, layout.length).contiguous()
