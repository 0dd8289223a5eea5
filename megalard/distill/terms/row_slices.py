"""Sums over logits that exist for a few rows at a time, whatever the length of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch

ROWS = 1024


def sum_of_row_slices(
    slice_sum: Callable[..., torch.Tensor],
    row_tensors: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Return Σ over slices of rows of ``slice_sum(*rows of row_tensors, *weights)``.

    The backward pass computes each slice again, so that its logits are not kept. It sums the
    gradients of the weights over slices in fp32, whatever the dtype of the weights.

    Args:
        slice_sum: returns a scalar.
        row_tensors: tensors with the same number of rows.
        weights: tensors that every slice needs in full.
    """
    return _SumOfRowSlices.apply(slice_sum, len(row_tensors), *row_tensors, *weights)


class _SumOfRowSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slice_sum, num_row_tensors, *tensors):
        ctx.slice_sum, ctx.num_row_tensors = slice_sum, num_row_tensors
        ctx.save_for_backward(*tensors)
        row_tensors, weights = tensors[:num_row_tensors], tensors[num_row_tensors:]
        total = row_tensors[0].new_zeros((), dtype=torch.float32)
        for rows in zip(*(x.split(ROWS) for x in row_tensors), strict=True):
            total = total + slice_sum(*rows, *weights)
        return total

    @staticmethod
    def backward(ctx, grad):
        tensors, count = ctx.saved_tensors, ctx.num_row_tensors
        needs = ctx.needs_input_grad[2:]
        grads = [
            torch.zeros_like(x, dtype=x.dtype if i < count else torch.float32) if needed else None
            for i, (x, needed) in enumerate(zip(tensors, needs, strict=True))
        ]
        for start in reversed(range(0, tensors[0].shape[0], ROWS)):
            rows = slice(start, start + ROWS)
            inputs = [
                (x[rows] if i < count else x).detach().requires_grad_(needed)
                for i, (x, needed) in enumerate(zip(tensors, needs, strict=True))
            ]
            with torch.enable_grad():
                value = ctx.slice_sum(*inputs)
            wanted = [i for i, needed in enumerate(needs) if needed]
            parts = torch.autograd.grad(value, [inputs[i] for i in wanted], grad, allow_unused=True)
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
