"""Causal attention of a document's last queries: two calls of a fused kernel whose results merge.

Queries at the end of their keys see a trapezoid, which cuDNN does not offer as a shape. It is cut
into two shapes that cuDNN offers: a rectangle, the keys before the first query, and a triangle, the
keys at the places of the queries.

             keys before the first query    keys of the queries
    query 0  # # # # # # # # # # # # # #    #
    query 1  # # # # # # # # # # # # # #    # #
    query 2  # # # # # # # # # # # # # #    # # #

The results merge exactly by the log-sum-exp of each row. In the backward pass the output and the
log-sum-exp of the whole row give each part its gradients, as in ring attention (Liu et al.,
arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend

from megalard.model.fuse import fused_on_gpu

_aten = torch.ops.aten


def merged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence
) -> torch.Tensor:
    """Return softmax(q kᵀ / sqrt(d)) v of the given spans.

    Args:
        q, k, v, spans: as for ``megalard.model.attention.attend``.

    Returns:
        [b, s, Hq, d], contiguous; zeros outside all spans.
    """
    return _MergedAttention.apply(q, k, v, tuple(spans))


def uses_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch would compute causal attention of such q, k and v with cuDNN."""
    square = min(q.shape[2], k.shape[2])
    q, k, v = (x[:, :, :square] for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=is_grouped)
    return choice == SDPBackend.CUDNN_ATTENTION.value


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spans):
        batch, heads, length, dim = q.shape
        out = q.new_zeros(batch, length, heads, dim).transpose(1, 2)
        lse = q.new_zeros(batch, heads, length, 1, dtype=torch.float32)
        for row, rows, rectangle, triangle in _parts(spans):
            result = attention_part(q[row, :, rows], k[row, :, triangle], v[row, :, triangle], True)
            if rectangle.stop > rectangle.start:
                keys, values = (x[row, :, rectangle] for x in (k, v))
                result = merge(*result, *attention_part(q[row, :, rows], keys, values, False))
            out[row, :, rows], lse[row, :, rows] = result
        ctx.spans = spans
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.contiguous().transpose(1, 2)  # copied here at most once, and not per part
        grad_q, grad_k, grad_v = map(torch.zeros_like, (q, k, v))
        for row, rows, rectangle, triangle in _parts(ctx.spans):
            for columns, causal in ((triangle, True), (rectangle, False)):
                if columns.stop == columns.start:
                    continue
                row_tensors = (x[row, :, rows] for x in (grad, q, out, lse))
                column_tensors = (x[row, :, columns] for x in (k, v))
                parts = attention_part_backward(*row_tensors, *column_tensors, causal)
                for total, part in zip(
                    (grad_q[row, :, rows], grad_k[row, :, columns], grad_v[row, :, columns]),
                    parts,
                    strict=True,
                ):
                    total += part
        return grad_q, grad_k, grad_v, None


def _parts(spans) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Yield each span's batch row, its queries, and the keys of its rectangle and its triangle."""
    for span in spans:
        first_query_key = span.key_end - (span.end - span.start)
        row, rows = slice(span.row, span.row + 1), slice(span.start, span.end)
        yield (
            row,
            rows,
            slice(span.key_start, first_query_key),
            slice(first_query_key, span.key_end),
        )


@fused_on_gpu
def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over two disjoint sets of keys of the same queries.

    Args:
        out, other: attention over each set, [b, h, s, d].
        lse, other_lse: log-sum-exp of each row over each set, fp32 [b, h, s, 1].

    Returns:
        Attention over the union of both sets, and its log-sum-exp.
    """
    both = torch.logaddexp(lse, other_lse)
    merged = out.float() * (lse - both).exp() + other.float() * (other_lse - both).exp()
    return merged.to(out.dtype), both


def attention_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention [b, h, s, d] and the log-sum-exp of its rows, fp32 [b, h, s, 1].

    CUDA tensors in half precision go to cuDNN, CPU tensors to torch's flash kernel. Hkv may divide
    Hq. Causal attention takes as many queries as keys.
    """
    if q.is_cuda:
        return _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse[..., None]


def as_torch_has_them(
    grad: torch.Tensor, out: torch.Tensor, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a gradient and an output in the memory layouts that they have in torch's attention.

    torch 2.11 finds cuDNN's plan for the backward pass by the strides of q, k and v alone. A plan
    that was made for other strides of the gradient or of the output gives wrong results. Both
    therefore get the strides that they have in ``megalard.model.attention``: the gradient is
    contiguous tokens first, and the output has the order of q.

    Args:
        grad, out, q: [b, h, s, d].
    """
    is_heads_first = q.stride(1) > q.stride(2)
    return _tokens_first(grad), out.contiguous() if is_heads_first else _tokens_first(out)


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """Return [b, h, s, d] contiguous as [b, s, h, d]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attention_part_backward(grad, q, out, lse, k, v, causal: bool):
    """Return the gradients of q, k and v for some of a row's keys.

    Args:
        grad, out, lse: gradient, output and log-sum-exp of the whole rows, over all their keys.
        q: the queries.
        k, v: some of the keys and their values.
        causal: as for ``attention_part``.
    """
    lse = lse.contiguous()
    if q.is_cuda:
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # state of the dropout
        grad, out = as_torch_has_them(grad, out, q)
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, unused, unused, None, None, None, q.shape[2], k.shape[2],
            0.0, causal,
        )  # fmt: skip
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    grad_q, *grads_kv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse[..., 0], 0.0, causal
    )
    return grad_q, *(x.unflatten(1, (-1, groups)).sum(2) for x in grads_kv)
