"""Sums over logits that exist for a few rows at a time, whatever the length of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch

_ROWS = 1024


def sum_of_chunks(
    chunk_sum: Callable[..., torch.Tensor],
    row_tensors: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Return Σ over chunks of rows of ``chunk_sum(*rows of row_tensors, *weights)``.

    The backward pass computes each chunk again, so that its logits are not kept. It sums the
    gradients of the weights over chunks in fp32, whatever the dtype of the weights.

    Args:
        chunk_sum: returns a scalar.
        row_tensors: tensors with the same number of rows.
        weights: tensors that every chunk needs in full.
    """
    return _SumOfChunks.apply(chunk_sum, len(row_tensors), *row_tensors, *weights)


class _SumOfChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunk_sum, num_row_tensors, *tensors):
        ctx.chunk_sum, ctx.num_row_tensors = chunk_sum, num_row_tensors
        ctx.save_for_backward(*tensors)
        row_tensors, weights = tensors[:num_row_tensors], tensors[num_row_tensors:]
        total = row_tensors[0].new_zeros((), dtype=torch.float32)
        for rows in zip(*(x.split(_ROWS) for x in row_tensors), strict=True):
            total = total + chunk_sum(*rows, *weights)
        return total

    @staticmethod
    def backward(ctx, grad):
        tensors, count = ctx.saved_tensors, ctx.num_row_tensors
        needs = ctx.needs_input_grad[2:]
        grads = [
            torch.zeros_like(x, dtype=x.dtype if i < count else torch.float32) if needed else None
            for i, (x, needed) in enumerate(zip(tensors, needs, strict=True))
        ]
        for start in reversed(range(0, tensors[0].shape[0], _ROWS)):
            rows = slice(start, start + _ROWS)
            inputs = [
                (x[rows] if i < count else x).detach().requires_grad_(needed)
                for i, (x, needed) in enumerate(zip(tensors, needs, strict=True))
            ]
            with torch.enable_grad():
                chunk = ctx.chunk_sum(*inputs)
            wanted = [i for i, needed in enumerate(needs) if needed]
            parts = torch.autograd.grad(chunk, [inputs[i] for i in wanted], grad, allow_unused=True)
            for i, part in zip(wanted, parts, strict=True):
                if part is None:  # a teacher's tensor, which the loss is constant in
                    continue
                if i < count:
                    grads[i][rows] = part
                else:
                    grads[i] += part
        return (
            None,
            None,
            *(None if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)),
        )
