"""Causal attention over documents, with sliding windows; exact, in linear memory.

On CUDA in half precision documents of several lengths are one call of a variable-length kernel:
flash-attn's where it is installed, else torch's own; long ones are calls of cuDNN, which on Hopper
is twice as fast as the latter. Everywhere else they are scaled_dot_product_attention, one call a
document.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from megalard.model.merged_attention import merged_attention, takes_cudnn
from megalard.transfer import to_device

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

try:
    from torch.nn.attention.varlen import varlen_attn

    _VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters.keys()
except ImportError:
    _VARLEN_OPTIONS = ()

_BLOCK_ROWS = 1024

# Of a span of so many queries a call or two of cuDNN's were measured to pay; and it is only asked
# for shapes of some size, since it fails at some of a single row.
LONG_QUERIES, _LONG_KEYS = 2048, 256


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Sequence,
    window: int | None,
) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(d)) v within each document.

    Args:
        q: [b, Hq, s, d], the queries at hand.
        k, v: [b, Hkv, n, d] of the whole block, Hq a multiple of Hkv.
        spans: queries ``start:end`` of batch row ``row`` see keys ``first:last``, of which the last
            is the last query's own (``Span`` of ``parallel.context.shard``), by row and start.
            Queries outside all spans (padding) get zeros.
        window: query i sees key j only if i - j < window; None for all j <= i.

    Returns:
        [b, s, Hq, d], contiguous.
    """
    batch, heads, length, dim = q.shape
    if not spans:
        # zeros that still depend on k and v, whose gradients' exchange is a collective. By a
        # tensor, which autograd saves: a layer is recomputed up to its last saved tensor, and must
        # come past the gathers of k and v as it does on ranks that have queries
        zero = q.new_zeros(())
        return (q * zero).transpose(1, 2).contiguous() + ((k * zero).sum() + (v * zero).sum())
    half = q.is_cuda and q.dtype != torch.float32
    if flash_attn_varlen_func is not None and half:
        return _variable_length(_flash, q, k, v, spans, window)
    whole = length == k.shape[2] and len(spans) == batch
    if whole and all(span.end - span.start == length for span in spans):
        return _causal(q, k, v, window).transpose(1, 2).contiguous()
    long = [span for span in spans if _is_long(span)]
    if half and long and (window is None or window >= k.shape[2]) and takes_cudnn(q, k, v):
        short = [span for span in spans if not _is_long(span)]
        out = merged_attention(q, k, v, long)
        return out + attend(q, k, v, short, window) if short else out
    if half and "window_size" in _VARLEN_OPTIONS and dim % 8 == 0 and dim <= 256:
        return _variable_length(_varlen, q, k, v, spans, window)

    rows: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    done = [0] * batch
    for span in spans:
        row = span.row
        if span.start > done[row]:
            rows[row].append(q.new_zeros(heads, span.start - done[row], dim))
        queries = q[row : row + 1, :, span.start : span.end]
        keys = (slice(row, row + 1), slice(None), slice(span.first, span.last))
        rows[row].append(_causal(queries, k[keys], v[keys], window)[0])
        done[row] = span.end
    for row, end in enumerate(done):
        if end < length:
            rows[row].append(q.new_zeros(heads, length - end, dim))
    return torch.stack([torch.cat(parts, dim=1).transpose(0, 1) for parts in rows])


def _is_long(span) -> bool:
    queries = span.end - span.start
    before = span.last - span.first - queries
    return queries >= LONG_QUERIES and (before == 0 or before >= _LONG_KEYS)


def _causal(q, k, v, window):
    """Causal attention of the last queries of a document: the last query stands at the last key."""
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if window is None or window >= keys:
        if queries == keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        # fp32 with grouped heads has no fused kernel that takes this mask, and would hold it whole
        if q.is_cuda and (q.dtype != torch.float32 or not grouped):
            corner = causal_lower_right(queries, keys)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=corner, enable_gqa=grouped)
    # blocks of queries against the keys they reach: memory stays linear in the length
    parts, before = [], keys - queries
    for start in range(0, queries, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, queries)
        first = 0 if window is None else max(0, before + start - window + 1)
        row = torch.arange(before + start, before + end, device=q.device)[:, None]
        column = torch.arange(first, before + end, device=q.device)[None, :]
        seen = column <= row
        if window is not None:
            seen &= row - column < window
        reached = slice(first, before + end)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, reached],
                v[:, :, reached],
                attn_mask=seen,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, dim=2)


class _Packing(NamedTuple):
    """Where the spans' queries and keys stand among all rows; None where they are all, in order.

    ``ends_*`` are int32 [spans + 1], the cumulated lengths, and ``longest_*`` the longest of them.
    """

    place_q: torch.Tensor | None
    place_k: torch.Tensor | None
    ends_q: torch.Tensor
    ends_k: torch.Tensor
    longest_q: int
    longest_k: int


@functools.lru_cache(maxsize=8)
def _packing(spans: tuple, batch: int, queries: int, keys: int, device: torch.device) -> _Packing:
    """Made once for all layers, and for teacher and student."""

    def places(ranges: list[tuple[int, int]], rows: int) -> torch.Tensor | None:
        edges = [0, *itertools.chain.from_iterable(ranges), rows]
        if all(end == start for end, start in zip(edges[::2], edges[1::2], strict=True)):
            return None
        return to_device(torch.cat([torch.arange(*pair) for pair in ranges]), device)

    def ends(ranges: list[tuple[int, int]]) -> torch.Tensor:
        sizes = (end - start for start, end in ranges)
        total = list(itertools.accumulate(sizes, initial=0))
        return to_device(torch.tensor(total, dtype=torch.int32), device)

    q = [(s.row * queries + s.start, s.row * queries + s.end) for s in spans]
    k = [(s.row * keys + s.first, s.row * keys + s.last) for s in spans]
    longest = [max(end - start for start, end in ranges) for ranges in (q, k)]
    return _Packing(places(q, batch * queries), places(k, batch * keys), ends(q), ends(k), *longest)


def _variable_length(kernel, q, k, v, spans, window):
    """One call for all spans; padding queries, which no span covers, get zeros."""
    batch, heads, length, dim = q.shape
    pack = _packing(tuple(spans), batch, length, k.shape[2], q.device)

    def flat(x: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
        rows = x.transpose(1, 2).flatten(0, 1)
        return rows.contiguous() if place is None else rows.index_select(0, place)

    sides = (-1 if window is None else window - 1, 0)
    found = kernel(flat(q, pack.place_q), flat(k, pack.place_k), flat(v, pack.place_k), pack, sides)
    if pack.place_q is not None:
        out = found.new_zeros(batch * length, heads, dim)
        found = out.index_copy(0, pack.place_q, found)
    return found.view(batch, length, heads, dim)


def _flash(q, k, v, pack: _Packing, sides: tuple[int, int]):
    fixed = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(
        q, k, v, *pack[2:], causal=True, window_size=sides, deterministic=fixed
    )


def _varlen(q, k, v, pack: _Packing, sides: tuple[int, int]):
    groups, options = q.shape[1] // k.shape[1], {}
    if groups > 1 and "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = True
    elif groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return varlen_attn(q, k, v, *pack[2:], window_size=sides, **options)
