"""Causal attention over documents, with sliding windows; exact, in linear memory.

flash-attn's variable-length kernel is used where it is installed and applies (CUDA, half
precision); torch's scaled_dot_product_attention, one call a document, everywhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

_BLOCK_ROWS = 1024


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
            is the last query's own (``megalard.parallel.context.Span``); ordered by row and start.
            Queries outside all spans (padding) get zeros.
        window: query i sees key j only if i - j < window; None for all j <= i.

    Returns:
        [b, s, Hq, d], contiguous.
    """
    batch, heads, length, dim = q.shape
    if not spans:
        # zeros that still depend on k and v: their gradients' exchange is a collective
        return (q * 0).transpose(1, 2).contiguous() + (k.sum() + v.sum()) * 0
    if flash_attn_varlen_func is not None and q.is_cuda and q.dtype != torch.float32:
        return _flash(q, k, v, spans, window)
    whole = length == k.shape[2] and len(spans) == batch
    if whole and all(span.end - span.start == length for span in spans):
        return _causal(q, k, v, window).transpose(1, 2).contiguous()

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


def _flash(q, k, v, spans, window):
    """One variable-length call; padding queries, which no span covers, get zeros."""
    batch, heads, length, dim = q.shape
    place = [torch.arange(s.row * length + s.start, s.row * length + s.end) for s in spans]
    keys = [torch.arange(s.row * k.shape[2] + s.first, s.row * k.shape[2] + s.last) for s in spans]
    place, keys = torch.cat(place).to(q.device), torch.cat(keys).to(q.device)
    sizes_q = [span.end - span.start for span in spans]
    sizes_k = [span.last - span.first for span in spans]

    def flat(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(0, 1).index_select(0, index)

    def offsets(sizes: list[int]) -> torch.Tensor:
        ends = list(itertools.accumulate(sizes, initial=0))
        return torch.tensor(ends, dtype=torch.int32, device=q.device)

    found = flash_attn_varlen_func(
        flat(q, place),
        flat(k, keys),
        flat(v, keys),
        offsets(sizes_q),
        offsets(sizes_k),
        max(sizes_q),
        max(sizes_k),
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    out = found.new_zeros(batch * length, heads, dim).index_copy(0, place, found)
    return out.view(batch, length, heads, dim)
