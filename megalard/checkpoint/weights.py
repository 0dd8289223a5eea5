"""A base model with what was trained on it, read as the tensors of one model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from megalard.errors import UserError
from megalard.parallel.tensor.layout import Layout

BLOCK_ELEMENTS = 2**22  # of fp32, 16 MiB


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
    name: str, original: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """W + scale B A in fp32 on ``lora_a``'s device, rounded to W's dtype, in W's own memory.

    Beside W it takes one block of rows. A block has the bits of the whole product: compared with
    MKL 2024.2 on 184 shapes of 16 or more columns, in blocks of 2^16 elements and 64 rows or
    more. Products of fewer columns may differ, as may single rows; cuBLAS, which chooses its
    kernel by the shape, is given the whole.

    Raises:
        UserError: naming W, where the sum is finite and does not fit its dtype (fp16).
    """
    rows, columns = original.shape
    blocks = 1
    if lora_a.device.type == "cpu" and columns >= 16:
        blocks = max(1, min(-(-rows // max(64, BLOCK_ELEMENTS // columns)), rows // 64))
    for number in range(blocks):
        block = slice(number * rows // blocks, (number + 1) * rows // blocks)
        product = lora_b[block] @ lora_a
        product *= scale
        product += original[block].to(product)
        rounded = product.to(original.dtype)
        if original.dtype == torch.float16 and bool((rounded.isinf() & product.isfinite()).any()):
            raise UserError(
                f"{name} with LoRA merged into it reaches {float(product.abs().max()):.3g}, more "
                "than float16 holds: convert the base model to bfloat16 first"
            )
        original[block] = rounded
    return original


def check_trained(base: Weights, trained: Weights, names: Iterable[str]) -> None:
    """Refuse trained tensors that are no part of a base, or of other shapes than its own.

    Args:
        names: the tensors the merged model has.

    Raises:
        UserError: naming the first.
    """
    known, parts = set(names), set(trained.names())
    own = "give the model it was trained on with --base"
    for part in trained.names():
        stem, _, last = part.rpartition(".")
        is_lora = last in ("lora_A", "lora_B")
        name = f"{stem}.weight" if is_lora else part
        if name not in known:
            raise UserError(
                f"{trained.directory} has {part}, but {base.directory} has no tensor {name} of "
                f"its own to put it into: {own}"
            )
        shape, found = base.shape(name), trained.shape(part)
        if is_lora:
            pair = [f"{stem}.lora_A", f"{stem}.lora_B"]
            missing = [other for other in pair if other not in parts]
            if missing:
                raise UserError(
                    f"{trained.directory} has {part} without {missing[0]}: it is damaged; use "
                    "another copy"
                )
            (rank, columns), (rows, inner) = (_matrix(trained, other) for other in pair)
            if rank != inner:
                raise UserError(
                    f"{trained.directory} has {stem}.lora_A of rank {rank} and lora_B of rank "
                    f"{inner}: it is damaged; use another copy"
                )
            found = (rows, columns)
        if found != shape:
            raise UserError(
                f"{trained.directory} was trained on {name} of shape {list(found)}, but in "
                f"{base.directory} it has shape {list(shape)}: {own}"
            )


def _matrix(weights: Weights, name: str) -> tuple[int, int]:
    shape = weights.shape(name)
    if len(shape) != 2:
        raise UserError(
            f"{name} in {weights.directory} has shape {list(shape)} and is no matrix: use another "
            "copy"
        )
    return shape


class MergedWeights:
    """A base with trained weights in place of its own, and LoRA pairs merged into it.

    Args:
        base: the untrained model, whose dtypes the result has.
        trained: fp32 tensors by the base's names, or LoRA's (``...q_proj.lora_A``, ``lora_B``).
        scale: LoRA's alpha / rank.
        tied: whether the head is the embedding; one that stands in the base is then left out, as
            it would no longer be equal to a trained embedding.

    Raises:
        UserError: a trained tensor is no part of the base, or of another shape.
    """

    def __init__(self, base: Weights, trained: Weights, scale: float, tied: bool):
        self.base, self.trained, self.scale = base, trained, scale
        self.directory = trained.directory
        self._trained = set(trained.names())
        self._names = [n for n in base.names() if not (tied and n == "lm_head.weight")]
        check_trained(base, trained, self._names)

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
        merged = merge_lora(name, self.base.read(name), lora_a, lora_b, self.scale)
        if layout is None or layout.dim is None:
            return merged
        return merged.narrow(layout.dim, layout.start, layout.length).contiguous()
