"""Causal attention over documents, with sliding windows: exact, in linear memory.

On CUDA in half precision, documents of several lengths, and sliding windows, are one call of a
variable-length kernel. Long documents go to cuDNN instead where torch prefers it, because on Hopper
only FlashAttention-3 is faster. Everywhere else attention is one call of
``scaled_dot_product_attention`` per document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from megalard.model.merged_attention import merged_attention, uses_cudnn
from megalard.model.variable_length import (
    flash_attention_3,
    kernel_for,
    variable_length_attention,
)

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
    batch, _, length, _ = q.shape
    sees_all_keys = window is None or window >= k.shape[2]
    kernel = kernel_for(q)
    if kernel is flash_attention_3:  # the fastest for every shape
        return variable_length_attention(kernel, q, k, v, spans, window)
    rows_are_documents = length == k.shape[2] and len(spans) == batch
    rows_are_documents &= all(span.end - span.start == length for span in spans)
    if rows_are_documents and (sees_all_keys or kernel is None):
        return _ContiguousGradient.apply(_causal(q, k, v, window).transpose(1, 2).contiguous())
    long = [span for span in spans if _is_long(span)]
    if long and sees_all_keys and q.is_cuda and q.dtype != torch.float32 and uses_cudnn(q, k, v):
        short = [span for span in spans if not _is_long(span)]
        out = merged_attention(q, k, v, long)
        return out + attend(q, k, v, short, window) if short else out
    if kernel is not None:
        return variable_length_attention(kernel, q, k, v, spans, window)
    return attend_span_by_span(q, k, v, spans, window)


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous.

    A gradient with other strides than the one that a plan of cuDNN was made for gives wrong results
    in torch 2.11: see ``megalard.model.merged_attention.as_torch_has_them``.
    """

    @staticmethod
    def forward(ctx, out: torch.Tensor):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad.contiguous()


def _zeros_that_depend_on(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return zeros [b, s, Hq, d] whose backward pass still reaches q, k and v.

    A rank without queries must take part in the exchange of the gradients of k and v, which is a
    collective. Under activation checkpointing a layer is computed again only up to its last saved
    tensor. The zero is a tensor, which autograd saves, so that the gathers of k and v are computed
    again here too, as on ranks that have queries.
    """
    zero = q.new_zeros(())
    return (q * zero).transpose(1, 2).contiguous() + ((k * zero).sum() + (v * zero).sum())


def attend_span_by_span(q, k, v, spans: Sequence[QuerySpan], window: int | None) -> torch.Tensor:
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
        rows[row].append(_causal(queries, k[keys], v[keys], window).squeeze(0))
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
