"""The tensors of a model as a protocol, and a base model merged with what was trained on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch

from megalard.checkpoint.rounding import rounded
from megalard.errors import UserError, shown
from megalard.model.parameter_slice import ParameterSlice

BLOCK_ELEMENTS = 2**22  # 16 MiB of fp32


class Weights(Protocol):
    """The tensors of a model on disk, however they are stored.

    Attributes:
        directory: where the model is.
    """

    directory: Path

    def names(self) -> list[str]:
        """Return the names of the tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a full tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that ``read`` returns."""
        ...

    def files(self) -> list[Path]:
        """Return the files that the tensors are read from."""
        ...

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the full tensor, or a slice of it, on the CPU."""
        ...


def size_of(weights: Weights) -> int:
    """Return the number of bytes of all tensors."""
    return sum(tensor_bytes(weights, name) for name in weights.names())


def tensor_bytes(weights: Weights, name: str) -> int:
    """Return the number of bytes of one tensor."""
    return torch.Size(weights.shape(name)).numel() * weights.dtype(name).itemsize


def no_tensor(name: str, weights: Weights) -> UserError:
    """Return the error of a tensor that is missing, with a name from the files that is similar."""
    names = weights.names()
    last = name.rpartition("layers.")[2].partition(".")[2] or name
    similar = next((other for other in names if other.endswith(last)), names[0] if names else None)
    hint = f" (its files name tensors such as {shown(similar)})" if similar else ""
    return UserError(
        f"{weights.directory} has no tensor {name}, which its config.json implies{hint}"
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. No other tensor of its size is made."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()
    # If there is a NaN, aminmax returns it as minimum and as maximum.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def are_equal(weights: Weights, name: str, other: str) -> bool:
    """Whether two matrices hold the same values. A block of rows of each is read at a time."""
    shape = weights.shape(name)
    if shape != weights.shape(other) or len(shape) != 2:
        return False
    rows = max(1, BLOCK_ELEMENTS // shape[1])
    for start in range(0, shape[0], rows):
        block = ParameterSlice(shape, 0, start, min(rows, shape[0] - start), 1)
        x, y = weights.read(name, block), weights.read(other, block)
        if not torch.equal(x.float(), y.float()):
            return False
    return True


def trained_parts(name: str, trained: Iterable[str]) -> list[str]:
    """Return the trained tensors of a weight: itself, LoRA's A and B, all three, or none."""
    stem = name.removesuffix("weight")
    return [part for part in (name, f"{stem}lora_A", f"{stem}lora_B") if part in trained]


def merge_lora(
    name: str,
    original: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
    stochastic: bool = False,
    on_block: Callable[[slice, torch.Tensor, torch.Tensor], None] = lambda *_: None,
) -> torch.Tensor:
    """Return W + scale B A, computed in fp32 on the device of ``lora_a`` and rounded.

    In W's dtype the result takes the memory of ``original``, and one block of rows is needed in
    addition. A block has the same bits as the same rows of the full product. This was compared with
    MKL 2024.2 on 184 shapes of 16 or more columns, in blocks of 2^16 elements and 64 rows or more.
    Products of fewer columns, and single rows, may differ. cuBLAS chooses its kernel by the shape
    and is given the full product.

    Args:
        name: the name of W, for error messages and for stochastic rounding.
        original: W, [out, in].
        lora_a, lora_b: A [rank, in] and B [out, rank], fp32.
        dtype: the dtype of the result; None takes that of W.
        stochastic: as for ``megalard.checkpoint.rounding.rounded``.
        on_block: called with the rows of each block, their exact values and their rounded values.

    Raises:
        UserError: a sum is finite but too large for the dtype (fp16).
    """
    dtype = dtype or original.dtype
    merged = original if dtype == original.dtype else torch.empty_like(original, dtype=dtype)
    rows, columns = original.shape
    blocks = 1
    if lora_a.device.type == "cpu" and columns >= 16:
        blocks = max(1, min(-(-rows // max(64, BLOCK_ELEMENTS // columns)), rows // 64))
    for number in range(blocks):
        block = slice(number * rows // blocks, (number + 1) * rows // blocks)
        product = lora_b[block] @ lora_a
        product *= scale
        product += original[block].to(product)
        stored = rounded(product, dtype, name, block.start, stochastic)
        if dtype == torch.float16 and bool((stored.isinf() & product.isfinite()).any()):
            raise UserError(
                f"{name} with LoRA merged into it reaches {float(product.abs().max()):.3g}, more "
                "than float16 holds: convert the base model to bfloat16 first"
            )
        on_block(block, product, stored)
        merged[block] = stored
    return merged


def check_trained(base: Weights, trained: Weights, names: Iterable[str]) -> None:
    """Refuse trained tensors that do not belong to the base or have other shapes.

    Args:
        names: the tensors that the merged model has.

    Raises:
        UserError: a trained tensor does not fit; the message names the first one.
    """
    base_names, parts = set(names), set(trained.names())
    fix = "give the model it was trained on with --base"
    for part in trained.names():
        stem, _, last = part.rpartition(".")
        is_lora = last in ("lora_A", "lora_B")
        name = f"{stem}.weight" if is_lora else part
        if name not in base_names:
            raise UserError(
                f"{trained.directory} has {part}, but {base.directory} has no tensor {name} that "
                f"it could be merged into: {fix}"
            )
        shape, trained_shape = base.shape(name), trained.shape(part)
        if is_lora:
            trained_shape = _merged_shape(trained, stem, part, parts)
        if trained_shape != shape:
            raise UserError(
                f"{trained.directory} was trained on {name} of shape {list(trained_shape)}, but in "
                f"{base.directory} it has shape {list(shape)}: {fix}"
            )


def _merged_shape(trained: Weights, stem: str, part: str, parts: set[str]) -> tuple[int, int]:
    """Return the shape of B A."""
    pair = [f"{stem}.lora_A", f"{stem}.lora_B"]
    missing = [name for name in pair if name not in parts]
    if missing:
        raise UserError(
            f"{trained.directory} has {part} without {missing[0]}: it is damaged; use another copy"
        )
    (rank_a, columns), (rows, rank_b) = (_matrix_shape(trained, name) for name in pair)
    if rank_a != rank_b:
        raise UserError(
            f"{trained.directory} has {stem}.lora_A of rank {rank_a} and lora_B of rank {rank_b}: "
            "it is damaged; use another copy"
        )
    return rows, columns


def _matrix_shape(weights: Weights, name: str) -> tuple[int, int]:
    shape = weights.shape(name)
    if len(shape) != 2:
        raise UserError(
            f"{name} in {weights.directory} has shape {list(shape)} and is not a matrix: use "
            "another copy"
        )
    return shape


class MergedWeights:
    """A base model in which trained weights replace its own, and LoRA pairs are merged.

    Args:
        base: the untrained model, whose dtypes the result has unless another one is chosen.
        trained: fp32 tensors under the names of the base, or under the names of LoRA pairs
            (``...q_proj.lora_A`` and ``lora_B``).
        scale: LoRA's alpha / rank.
        tied: whether the embedding is also the head. A head in the files of the base is then left
            out, because it would no longer be equal to a trained embedding.
        chosen_dtype: the dtype of all floating-point tensors; None takes that of the base.
        stochastic: whether trained weights are rounded stochastically.

    Raises:
        UserError: a trained tensor does not belong to the base, or has another shape.
    """

    def __init__(
        self,
        base: Weights,
        trained: Weights,
        scale: float,
        tied: bool,
        chosen_dtype: torch.dtype | None = None,
        stochastic: bool = False,
    ):
        self.base, self.trained, self.scale, self.tied = base, trained, scale, tied
        self._chosen_dtype, self._stochastic = chosen_dtype, stochastic
        self.directory = trained.directory
        self._trained_names = set(trained.names())
        self._names = [n for n in base.names() if not (tied and n == "lm_head.weight")]
        check_trained(base, trained, self._names)

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        stored = self.base.dtype(name)
        return self._chosen_dtype if self._chosen_dtype and stored.is_floating_point else stored

    def files(self) -> list[Path]:
        return [*self.trained.files(), *self.base.files()]

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the tensor, or a slice of it, in its dtype."""
        parts, dtype = trained_parts(name, self._trained_names), self.dtype(name)
        if not parts:
            return self.base.read(name, held).to(dtype)
        if parts == [name]:
            if not self._stochastic:
                return self.trained.read(name, held).to(dtype)
            full = rounded(self.trained.read(name), dtype, name, 0, True)
            return full if held is None else held.cut(full).contiguous()
        # The full tensor is merged and then cut, because a product of slices may round differently.
        # If an earlier stage changed the weight itself, the pair is added to the changed weight.
        lora_a, lora_b = (self.trained.read(part) for part in parts[-2:])
        original = self.trained.read(name) if name in parts else self.base.read(name)
        merged = merge_lora(name, original, lora_a, lora_b, self.scale, dtype, self._stochastic)
        return merged if held is None else held.cut(merged).contiguous()

    def rounded_to(self, dtype: torch.dtype | None, stochastic: bool = False) -> MergedWeights:
        """Return the same model with another rounding of its trained weights.

        Args:
            dtype: the dtype of all floating-point tensors; None takes that of the base.
            stochastic: whether trained weights are rounded stochastically.
        """
        parts = self.base, self.trained, self.scale, self.tied
        return MergedWeights(*parts, dtype, stochastic)


class ConvertedWeights:
    """A model whose floating-point tensors are converted to another dtype when they are read."""

    def __init__(self, weights: Weights, dtype: torch.dtype):
        self._weights, self._dtype = weights, dtype
        self.directory = weights.directory
        self.names, self.shape, self.files = weights.names, weights.shape, weights.files

    def dtype(self, name: str) -> torch.dtype:
        stored = self._weights.dtype(name)
        return self._dtype if stored.is_floating_point else stored

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the tensor, or a slice of it, in the chosen dtype.

        Raises:
            UserError: a value is NaN or infinity, or becomes infinity.
        """
        tensor = self._weights.read(name, held).to(self.dtype(name))
        if not is_finite(tensor):
            raise UserError(
                f"{name} of {self.directory} holds NaN or infinity as {dtype_name(self._dtype)}: "
                "choose another --dtype"
            )
        return tensor


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as config.json has it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
