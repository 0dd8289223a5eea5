"""Causal attention over documents, with sliding windows: exact, in linear memory.

On CUDA in half precision, documents of several lengths are one call of a variable-length kernel:
flash-attn's where it is installed, otherwise torch's. Long documents go to cuDNN instead of torch's
kernel, because cuDNN is twice as fast on Hopper. Everywhere else attention is one call of
``scaled_dot_product_attention`` per document.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from megalard.model.merged_attention import merged_attention, uses_cudnn
from megalard.transfer import to_device

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

_BLOCK_ROWS = 1024

# cuDNN is faster from this many queries on (measured). Short key ranges before the queries are
# excluded, because cuDNN rejects some shapes of a single row.
LONG_QUERIES, _LONG_KEYS = 2048, 256


class QuerySpan(Protocol):
    """Consecutive queries of one document; see ``megalard.parallel.context.shard.Span``."""

    @property
    def row(self) -> int: ...

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def key_start(self) -> int: ...

    @property
    def key_end(self) -> int: ...


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Sequence[QuerySpan],
    window: int | None,
) -> torch.Tensor:
    """Return softmax(q kᵀ / sqrt(d)) v within each document.

    Args:
        q: [b, Hq, s, d], this rank's queries.
        k, v: [b, Hkv, n, d] of the whole block; Hq is a multiple of Hkv.
        spans: queries ``start:end`` of batch row ``row`` see keys
            ``key_start:key_end``, and the last query stands at the last of these keys. Ordered by
            row and start. Queries outside all spans are padding.
        window: query i sees key j only if i - j < window; None for all j <= i.

    Returns:
        [b, s, Hq, d], contiguous; zeros for padding.
    """
    if not spans:
        return _zeros_that_depend_on(q, k, v)
    is_half_on_gpu = q.is_cuda and q.dtype != torch.float32
    if flash_attn_varlen_func is not None and is_half_on_gpu:
        return _variable_length(_flash, q, k, v, spans, window)
    batch, _, length, dim = q.shape
    one_document_per_row = length == k.shape[2] and len(spans) == batch
    if one_document_per_row and all(span.end - span.start == length for span in spans):
        return _causal(q, k, v, window).transpose(1, 2).contiguous()
    long = [span for span in spans if _is_long(span)]
    sees_all_keys = window is None or window >= k.shape[2]
    if is_half_on_gpu and long and sees_all_keys and uses_cudnn(q, k, v):
        short = [span for span in spans if not _is_long(span)]
        out = merged_attention(q, k, v, long)
        return out + attend(q, k, v, short, window) if short else out
    if is_half_on_gpu and "window_size" in _varlen_options() and dim % 8 == 0 and dim <= 256:
        return _variable_length(_varlen, q, k, v, spans, window)
    return _span_by_span(q, k, v, spans, window)


def _zeros_that_depend_on(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return zeros [b, s, Hq, d] whose backward pass still reaches q, k and v.

    A rank without queries must take part in the exchange of the gradients of k and v, which is a
    collective. Under activation checkpointing a layer is computed again only up to its last saved
    tensor. The zero is a tensor, which autograd saves, so that the gathers of k and v are computed
    again here too, as on ranks that have queries.
    """
    zero = q.new_zeros(())
    return (q * zero).transpose(1, 2).contiguous() + ((k * zero).sum() + (v * zero).sum())


def _span_by_span(q, k, v, spans: Sequence[QuerySpan], window: int | None) -> torch.Tensor:
    """Attend to one span at a time; the general case."""
    batch, heads, length, dim = q.shape
    rows: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    filled = [0] * batch
    for span in spans:
        row = span.row
        if span.start > filled[row]:
            rows[row].append(q.new_zeros(heads, span.start - filled[row], dim))
        queries = q[row : row + 1, :, span.start : span.end]
        keys = (slice(row, row + 1), slice(None), slice(span.key_start, span.key_end))
        rows[row].append(_causal(queries, k[keys], v[keys], window)[0])
        filled[row] = span.end
    for row, end in enumerate(filled):
        if end < length:
            rows[row].append(q.new_zeros(heads, length - end, dim))
    return torch.stack([torch.cat(parts, dim=1).transpose(0, 1) for parts in rows])


def _is_long(span: QuerySpan) -> bool:
    queries = span.end - span.start
    keys_before = span.key_end - span.key_start - queries
    return queries >= LONG_QUERIES and (keys_before == 0 or keys_before >= _LONG_KEYS)


def _causal(q, k, v, window):
    """Return causal attention of a document's last queries; the last query is at the last key."""
    queries, keys = q.shape[2], k.shape[2]
    is_grouped = q.shape[1] != k.shape[1]
    if window is None or window >= keys:
        if queries == keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        # For fp32 with grouped heads no fused kernel takes this mask, and torch would store it.
        if q.is_cuda and (q.dtype != torch.float32 or not is_grouped):
            from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler

            corner = causal_lower_right(queries, keys)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=corner, enable_gqa=is_grouped)
    # Each block of queries attends to the keys that it reaches, so memory is linear in the length.
    parts, keys_before = [], keys - queries
    for start in range(0, queries, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, queries)
        first_key = 0 if window is None else max(0, keys_before + start - window + 1)
        row = torch.arange(keys_before + start, keys_before + end, device=q.device)[:, None]
        column = torch.arange(first_key, keys_before + end, device=q.device)[None, :]
        is_seen = column <= row
        if window is not None:
            is_seen &= row - column < window
        reached = slice(first_key, keys_before + end)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, reached],
                v[:, :, reached],
                attn_mask=is_seen,
                enable_gqa=is_grouped,
            )
        )
    return torch.cat(parts, dim=2)


class _Packing(NamedTuple):
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
def _packing(spans: tuple, batch: int, queries: int, keys: int, device: torch.device) -> _Packing:
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
    return _Packing(
        row_indices(q, batch * queries), row_indices(k, batch * keys), ends(q), ends(k), *longest
    )


def _variable_length(kernel: Callable, q, k, v, spans, window):
    """Compute all spans in one call; padding queries, which no span covers, get zeros."""
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


def _flash(q, k, v, pack: _Packing, sides: tuple[int, int]):
    return flash_attn_varlen_func(
        q,
        k,
        v,
        *pack[2:],
        causal=True,
        window_size=sides,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@functools.cache
def _varlen_options() -> set[str]:
    """Return the arguments of torch's kernel; none in a version that lacks it.

    The kernel is imported where it is used, because that imports torch's compiler.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return set()
    return set(inspect.signature(varlen_attn).parameters)


def repeats_kv_heads() -> bool:
    """Whether packed documents repeat the heads of k and v for groups of query heads on a GPU."""
    return flash_attn_varlen_func is None and "enable_gqa" not in _varlen_options()


def _varlen(q, k, v, pack: _Packing, sides: tuple[int, int]):
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and "enable_gqa" in _varlen_options():
        options["enable_gqa"] = True
    elif groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return varlen_attn(q, k, v, *pack[2:], window_size=sides, **options)
