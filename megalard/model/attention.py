"""Causal attention over documents, with sliding windows; exact, in linear memory.

flash-attn's variable-length kernel is used where it is installed and applies (CUDA, half
precision); torch's scaled_dot_product_attention, one call a document, everywhere else.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

_WINDOW_ROWS = 1024


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: tuple[tuple[int, int, int], ...],
    window: int | None,
) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(d)) v within each document.

    Args:
        q: [b, Hq, s, d].
        k, v: [b, Hkv, s, d], Hq a multiple of Hkv.
        documents: (row, start, end) half-open token ranges, each attending only to itself,
            ordered by row and start; tokens outside all of them (padding) get zeros.
        window: query i sees key j only if i - j < window; None for all j <= i.

    Returns:
        [b, s, Hq, d], contiguous.
    """
    batch, heads, length, dim = q.shape
    if flash_attn_varlen_func is not None and q.is_cuda and q.dtype != torch.float32:
        return _flash(q, k, v, documents, window)
    if len(documents) == batch and all(span[1:] == (0, length) for span in documents):
        return _causal(q, k, v, window).transpose(1, 2).contiguous()

    rows: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    done = [0] * batch
    for row, start, end in documents:
        if start > done[row]:
            rows[row].append(q.new_zeros(heads, start - done[row], dim))
        pick = (slice(row, row + 1), slice(None), slice(start, end))
        rows[row].append(_causal(q[pick], k[pick], v[pick], window)[0])
        done[row] = end
    for row, end in enumerate(done):
        if end < length:
            rows[row].append(q.new_zeros(heads, length - end, dim))
    return torch.stack([torch.cat(parts, dim=1).transpose(0, 1) for parts in rows])


def _causal(q, k, v, window):
    length = q.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    # blocks of queries against the keys their windows reach: memory stays linear in the length
    parts = []
    for start in range(0, length, _WINDOW_ROWS):
        end = min(start + _WINDOW_ROWS, length)
        first = max(0, start - window + 1)
        row = torch.arange(start, end, device=q.device)[:, None]
        column = torch.arange(first, end, device=q.device)[None, :]
        seen = (column <= row) & (row - column < window)
        keys, values = k[:, :, first:end], v[:, :, first:end]
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end], keys, values, attn_mask=seen, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2)


def _flash(q, k, v, documents, window):
    batch, heads, length, dim = q.shape
    bounds = sorted(
        {row * length + edge for row, start, end in documents for edge in (start, end)}
        | {row * length for row in range(batch + 1)}
    )
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    offsets = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    out = flash_attn_varlen_func(
        *(x.transpose(1, 2).reshape(batch * length, -1, dim) for x in (q, k, v)),
        offsets,
        offsets,
        longest,
        longest,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return out.view(batch, length, heads, dim)
