"""How each parameter is spread over the tensor-parallel ranks.

A parameter is a local tensor with Hugging Face's name; its ``Layout`` says which slice of the full
tensor it is, how many ranks hold that slice, and so over which ranks its gradient, of which each
holder computes only a part, has to be summed.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalard.errors import UserError
from megalard.model.spec import ModelSpec

_NORMS = ("input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm")


@dataclass(frozen=True)
class Layout:
    """This rank's slice of a parameter.

    Attributes:
        full_shape: shape of the whole tensor.
        dim: the dimension that is split, or None when every rank holds the whole.
        start, length: this rank's slice along ``dim``.
        holders: neighbouring tp ranks holding the same slice: 1, all, or a few for K/V heads.
    """

    full_shape: tuple[int, ...]
    dim: int | None
    start: int
    length: int
    holders: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        shape = list(self.full_shape)
        if self.dim is not None:
            shape[self.dim] = self.length
        return tuple(shape)


def check_divisible(spec: ModelSpec, tp: int) -> None:
    """Refuse a tp size the model cannot be split by.

    Raises:
        UserError: naming the size and the divisors that work.
    """
    heads, kv_heads, inner = spec.num_heads, spec.num_kv_heads, spec.intermediate_size

    def fits(size: int) -> bool:
        kv = kv_heads % size == 0 or size % kv_heads == 0
        return heads % size == 0 and inner % size == 0 and kv

    if not fits(tp):
        sizes = [size for size in range(1, heads + 1) if fits(size)]
        raise UserError(
            f"parallel.tp {tp} does not divide the model ({heads} heads, {kv_heads} K/V heads, "
            f"intermediate size {inner}): use one of {', '.join(map(str, sizes))}"
        )


def kv_replicas(spec: ModelSpec, tp: int) -> int:
    """How many tp ranks hold the same K/V heads: 1 unless there are fewer of them than ranks."""
    return max(1, tp // spec.num_kv_heads)


def parameter_layout(
    name: str, full_shape: tuple[int, ...], spec: ModelSpec, rank: int, tp: int
) -> Layout:
    """The layout of the parameter with this name (Hugging Face's, or with lora_A / lora_B)."""
    module, kind = name.split(".")[-2:]
    if module in _NORMS:
        return _whole(full_shape, tp)
    if module in ("embed_tokens", "lm_head"):
        # torch.chunk's uneven split, which is also DTensor's: the last ranks may hold fewer rows
        chunk = -(-full_shape[0] // tp)
        start = min(rank * chunk, full_shape[0])
        return Layout(full_shape, 0, start, min(chunk, full_shape[0] - start), 1)
    if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        if kind == "lora_A":
            return _whole(full_shape, tp)
        holders = kv_replicas(spec, tp) if module in ("k_proj", "v_proj") else 1
        parts = tp // holders
        length = full_shape[0] // parts
        return Layout(full_shape, 0, rank // holders * length, length, holders)
    if module in ("o_proj", "down_proj"):
        if kind in ("bias", "lora_B"):
            return _whole(full_shape, tp)
        length = full_shape[1] // tp
        return Layout(full_shape, 1, rank * length, length, 1)
    raise AssertionError(f"no layout for parameter {name}")


def _whole(full_shape: tuple[int, ...], tp: int) -> Layout:
    return Layout(full_shape, None, 0, 0, tp)
