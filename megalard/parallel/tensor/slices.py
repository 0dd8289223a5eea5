"""Decide which slice of each parameter a tensor-parallel rank holds.

A parameter is a local tensor with the name that it has at Hugging Face. Its ``ParameterSlice`` says
which slice of the full tensor it is, and how many ranks hold the same slice. Each of these replicas
computes only a part of the slice's gradient, so the gradient has to be summed over them.
"""

from __future__ import annotations

from megalard.errors import UserError
from megalard.model.names import (
    COLUMN_PARALLEL,
    NORMS,
    QK_NORMS,
    ROW_PARALLEL,
    VOCAB_PARALLEL,
    ParameterName,
)
from megalard.model.parameter_slice import ParameterSlice, full_slice
from megalard.model.spec import ModelSpec


def check_divisible(spec: ModelSpec, tp: int) -> None:
    """Refuse a tp size that the model cannot be split by.

    Args:
        spec: the shape of the model.
        tp: the tensor-parallel size.

    Raises:
        UserError: the model cannot be split by ``tp``; the message names the sizes that work.
    """
    sizes = tensor_parallel_sizes(spec)
    if tp not in sizes:
        raise UserError(
            f"parallel.tp {tp} does not divide the model ({spec.num_heads} heads, "
            f"{spec.num_kv_heads} K/V heads, intermediate size {spec.intermediate_size}): use one "
            f"of {', '.join(map(str, sizes))}"
        )


def tensor_parallel_sizes(spec: ModelSpec) -> list[int]:
    """Return the tp sizes that a model can be split by."""
    heads, kv_heads, intermediate = spec.num_heads, spec.num_kv_heads, spec.intermediate_size
    return [
        size
        for size in range(1, heads + 1)
        if heads % size == 0
        and intermediate % size == 0
        and (kv_heads % size == 0 or size % kv_heads == 0)
    ]


def kv_replicas(spec: ModelSpec, tp: int) -> int:
    """Return how many tp ranks hold the same K/V heads: 1 if there are enough heads for all."""
    return max(1, tp // spec.num_kv_heads)


def slice_of_parameter(
    name: str, full_shape: tuple[int, ...], spec: ModelSpec, rank: int, tp: int
) -> ParameterSlice:
    """Return the slice of a parameter on one rank of ``tp``."""
    parsed = ParameterName.parse(name)
    module, kind = parsed.module, parsed.kind
    if module in NORMS or (module in QK_NORMS and spec.qk_norm == "head"):
        return full_slice(full_shape, tp)
    if module in VOCAB_PARALLEL:
        # The uneven split of torch.chunk and of DTensor: the last ranks may hold fewer rows.
        chunk = -(-full_shape[0] // tp)
        start = min(rank * chunk, full_shape[0])
        return ParameterSlice(full_shape, 0, start, min(chunk, full_shape[0] - start), 1)
    if module in COLUMN_PARALLEL or module in QK_NORMS:
        if kind == "lora_A":
            return full_slice(full_shape, tp)
        is_kv = module in ("k_proj", "v_proj", "k_norm")
        replicas = kv_replicas(spec, tp) if is_kv else 1
        length = full_shape[0] // (tp // replicas)
        return ParameterSlice(full_shape, 0, rank // replicas * length, length, replicas)
    if module in ROW_PARALLEL:
        if kind in ("bias", "lora_B"):
            return full_slice(full_shape, tp)
        length = full_shape[1] // tp
        return ParameterSlice(full_shape, 1, rank * length, length, 1)
    raise AssertionError(f"no slice for parameter {name}")
