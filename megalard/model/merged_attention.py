"""Causal attention of a document's last queries: two calls of a fused kernel, then merged.

Queries that stand at the end of their keys see a triangle, which is no shape of cuDNN's. They see
all keys before the first of them, and causally the keys beside them: two shapes that are. The
parts merge exactly by their rows' log-sum-exp; backward, the whole row's output and log-sum-exp
give each part its gradients (as in ring attention, Liu et al., 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend

from megalard.model.fuse import fused_on_gpu

_aten = torch.ops.aten


def merged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence
) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(d)) v of spans as ``megalard.model.attention.attend`` takes them.

    Returns:
        [b, s, Hq, d], contiguous; zeros where no span is.
    """
    return _MergedAttention.apply(q, k, v, tuple(spans))


def takes_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch would give causal attention of such q, k and v to cuDNN."""
    square = min(q.shape[2], k.shape[2])
    chosen = torch._fused_sdp_choice(
        *(x[:, :, :square] for x in (q, k, v)),
        is_causal=True,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return chosen == SDPBackend.CUDNN_ATTENTION.value


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spans):
        batch, heads, length, dim = q.shape
        out = q.new_zeros(batch, length, heads, dim).transpose(1, 2)
        lse = q.new_zeros(batch, heads, length, 1, dtype=torch.float32)
        for row, rows, before, beside in _parts(spans):
            found = attention_part(q[row, :, rows], k[row, :, beside], v[row, :, beside], True)
            if before.stop > before.start:
                earlier = (x[row, :, before] for x in (k, v))
                found = merge(*found, *attention_part(q[row, :, rows], *earlier, False))
            out[row, :, rows], lse[row, :, rows] = found
        ctx.spans = spans
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        grad, grad_q, grad_k, grad_v = grad.transpose(1, 2), *map(torch.zeros_like, (q, k, v))
        for row, rows, before, beside in _parts(ctx.spans):
            for columns, causal in ((beside, True), (before, False)):
                if columns.stop == columns.start:
                    continue
                of_rows = (x[row, :, rows] for x in (grad, q, out, lse))
                of_columns = (x[row, :, columns] for x in (k, v))
                found = attention_part_backward(*of_rows, *of_columns, causal)
                for total, part in zip(
                    (grad_q[row, :, rows], grad_k[row, :, columns], grad_v[row, :, columns]),
                    found,
                    strict=True,
                ):
                    total += part
        return grad_q, grad_k, grad_v, None


def _parts(spans):
    """Of each span its batch row, its queries, and the keys before and beside them, as slices."""
    for span in spans:
        square = span.last - (span.end - span.start)
        row, rows = slice(span.row, span.row + 1), slice(span.start, span.end)
        yield row, rows, slice(span.first, square), slice(square, span.last)


@fused_on_gpu
def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from attention over each: [b, h, s, d], [b, h, s, 1] fp32."""
    both = torch.logaddexp(lse, other_lse)
    merged = out.float() * (lse - both).exp() + other.float() * (other_lse - both).exp()
    return merged.to(out.dtype), both


def attention_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp, fp32 [b, h, s, 1]; causal for as many queries as keys.

    cuDNN's on CUDA (half precision; Hkv may divide Hq), torch's flash kernel on the CPU.
    """
    if q.is_cuda:
        return _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse[..., None]


def attention_part_backward(grad, q, out, lse, k, v, causal: bool):
    """Gradients of q, k and v; ``out`` and ``lse`` are those of whole rows, over all their keys."""
    lse = lse.contiguous()
    if q.is_cuda:
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # state of the dropout
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, unused, unused, None, None, None, q.shape[2], k.shape[2],
            0.0, causal,
        )  # fmt: skip
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    grad_q, *of_columns = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse[..., 0], 0.0, causal
    )
    return grad_q, *(x.unflatten(1, (-1, groups)).sum(2) for x in of_columns)
