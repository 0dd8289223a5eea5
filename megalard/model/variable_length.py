"""Causal attention of several documents in one call of a variable-length kernel, on a GPU.

There are three kernels: FlashAttention-3 (the module ``flash_attn_interface``), flash-attn 2, and
torch's. docs/packages.md has their speeds.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from megalard.gpu import is_hopper
from megalard.transfer import to_device

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from flash_attn_interface import flash_attn_varlen_func as flash_attn_3_varlen_func
except ImportError:
    flash_attn_3_varlen_func = None


class Packing(NamedTuple):
    """Where the queries and keys of spans are among all rows of a batch.

    Attributes:
        rows_q, rows_k: int64 indices of the spans' rows; None where they are all rows in order.
        ends_q, ends_k: int32 [spans + 1], the cumulative lengths.
        longest_q, longest_k: the largest length.
    """

    rows_q: torch.Tensor | None
    rows_k: torch.Tensor | None
    ends_q: torch.Tensor
    ends_k: torch.Tensor
    longest_q: int
    longest_k: int


@functools.lru_cache(maxsize=8)
def _packing(spans: tuple, batch: int, queries: int, keys: int, device: torch.device) -> Packing:
    """Return the packing of a batch, made once for all layers and for teacher and student."""

    def row_indices(ranges: list[tuple[int, int]], rows: int) -> torch.Tensor | None:
        edges = [0, *itertools.chain.from_iterable(ranges), rows]
        if all(end == start for end, start in zip(edges[::2], edges[1::2], strict=True)):
            return None
        return to_device(torch.cat([torch.arange(*pair) for pair in ranges]), device)

    def ends(ranges: list[tuple[int, int]]) -> torch.Tensor:
        sizes = (end - start for start, end in ranges)
        total = list(itertools.accumulate(sizes, initial=0))
        return to_device(torch.tensor(total, dtype=torch.int32), device)

    q = [(s.row * queries + s.start, s.row * queries + s.end) for s in spans]
    k = [(s.row * keys + s.key_start, s.row * keys + s.key_end) for s in spans]
    longest = [max(end - start for start, end in ranges) for ranges in (q, k)]
    return Packing(
        row_indices(q, batch * queries), row_indices(k, batch * keys), ends(q), ends(k), *longest
    )


def kernel_for(q: torch.Tensor) -> Callable | None:
    """Return the fastest kernel that takes such queries; None if there is none."""
    dim = q.shape[-1]
    if not q.is_cuda or q.dtype == torch.float32 or dim % 8 or dim > 256:
        return None
    if flash_attn_3_varlen_func is not None and is_hopper(q.device):
        return flash_attention_3
    if flash_attn_varlen_func is not None:
        return flash_attention
    return torch_attention if "window_size" in _torch_options() else None


def variable_length_attention(
    kernel: Callable,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Sequence,
    window: int | None,
) -> torch.Tensor:
    """Compute all spans in one call of a kernel.

    Args:
        kernel: ``flash_attention_3``, ``flash_attention`` or ``torch_attention``.
        q, k, v, spans, window: as for ``megalard.model.attention.attend``.

    Returns:
        [b, s, Hq, d], contiguous; zeros for padding queries, which no span covers.
    """
    batch, heads, length, dim = q.shape
    pack = _packing(tuple(spans), batch, length, k.shape[2], q.device)

    def packed(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat.contiguous() if rows is None else flat.index_select(0, rows)

    sides = (-1 if window is None else window - 1, 0)
    result = kernel(
        packed(q, pack.rows_q), packed(k, pack.rows_k), packed(v, pack.rows_k), pack, sides
    )
    if pack.rows_q is not None:
        out = result.new_zeros(batch * length, heads, dim)
        result = out.index_copy(0, pack.rows_q, result)
    return result.view(batch, length, heads, dim)


def flash_attention(q, k, v, pack: Packing, sides: tuple[int, int]) -> torch.Tensor:
    """Return flash-attn 2's attention of packed tokens.

    Args:
        q, k, v: [tokens, heads, d], packed.
        pack: where the documents are.
        sides: how many keys a query sees before and after its place; -1 for all.

    Returns:
        [tokens, heads, d].
    """
    return flash_attn_varlen_func(
        q,
        k,
        v,
        *pack[2:],
        causal=True,
        window_size=sides,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def flash_attention_3(q, k, v, pack: Packing, sides: tuple[int, int]) -> torch.Tensor:
    """Return FlashAttention-3's attention; the arguments are those of ``flash_attention``."""
    result = flash_attn_3_varlen_func(
        q,
        k,
        v,
        *pack[2:],
        causal=True,
        window_size=sides,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # Some versions also return the log-sum-exp of each row.
    return result[0] if isinstance(result, tuple) else result


def torch_attention(q, k, v, pack: Packing, sides: tuple[int, int]) -> torch.Tensor:
    """Return torch's attention of packed tokens; the arguments are those of ``flash_attention``."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and "enable_gqa" in _torch_options():
        options["enable_gqa"] = True
    elif groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    result: Any = varlen_attn(q, k, v, *pack[2:], window_size=sides, **options)
    return result


def repeats_kv_heads() -> bool:
    """Whether packed documents repeat the heads of k and v for groups of query heads on a GPU."""
    is_installed = not (flash_attn_varlen_func is None and flash_attn_3_varlen_func is None)
    return not is_installed and "enable_gqa" not in _torch_options()


@functools.cache
def _torch_options() -> set[str]:
    """Return the arguments of torch's kernel; none in a version that lacks it.

    The kernel is imported where it is used, because that imports torch's compiler.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return set()
    return set(inspect.signature(varlen_attn).parameters)
