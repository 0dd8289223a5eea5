"""Collectives along one axis, and pairs of them for autograd.

Activations are [tokens, features]. A *sequence-parallel* region holds this rank's contiguous share
of the tokens (dim 0); a *tensor-parallel* region holds all tokens of this rank's features. The
names are those of Megatron-LM. The pairs are the conjugate f and g of Shoeybi et al. (arXiv
1909.08053) and Korthikanti et al. (arXiv 2205.05198).

If the ranks do not divide the tokens, the last ranks have rows of padding after their tokens, so
that all ranks have equally many rows. A gather keeps the padding as its last rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megalard.parallel.mesh import Axis

# torch 2.13 renamed these collectives and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: torch.Tensor, axis: Axis, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce ``x`` over the axis, in place, and return it. No autograd."""
    if axis.size > 1:
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_gather_tokens(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Gather [t / size, ...] of each rank to [t, ...] on every rank. No autograd."""
    if axis.size == 1:
        return x
    out = x.new_empty(x.shape[0] * axis.size, *x.shape[1:])
    _all_gather(out, x.contiguous(), group=axis.group)
    return out


def reduce_scatter_tokens(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum [t, ...] over the ranks and return this rank's [t / size, ...]. No autograd."""
    if axis.size == 1:
        return x
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=axis.group)
    return out


def padded_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Append zeros to dim 0 of [t] or [t, features], up to a multiple of the size of the axis."""
    missing = -x.shape[0] % axis.size
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


class PendingCollective:
    """A collective that has been started; ``wait`` returns its result. No autograd.

    Starting returns at once, so that computation overlaps the transfer.
    """

    def __init__(self, collective, out: torch.Tensor, x: torch.Tensor, axis: Axis):
        self._out, self._sent = out, x  # kept alive until the transfer is complete
        self._request = collective(out, x, group=axis.group, async_op=True)

    def wait(self) -> torch.Tensor:
        self._request.wait()
        return self._out


def start_all_gather_tokens(x: torch.Tensor, axis: Axis) -> PendingCollective:
    """Start ``all_gather_tokens`` over an axis of two ranks or more."""
    out = x.new_empty(x.shape[0] * axis.size, *x.shape[1:])
    return PendingCollective(_all_gather, out, x.contiguous(), axis)


def start_all_gather_tokens_into(
    out: torch.Tensor, x: torch.Tensor, axis: Axis
) -> PendingCollective:
    """Start ``all_gather_tokens`` with a result [t, ...] that has been allocated."""
    return PendingCollective(_all_gather, out, x, axis)


def start_reduce_scatter_tokens(x: torch.Tensor, axis: Axis) -> PendingCollective:
    """Start ``reduce_scatter_tokens`` over an axis of two ranks or more."""
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    return PendingCollective(_reduce_scatter, out, x.contiguous(), axis)


class _GatherTokens(torch.autograd.Function):
    """All-gather in the forward pass, reduce-scatter in the backward pass."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return all_gather_tokens(x, axis)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter_tokens(grad, ctx.axis), None


class _ReduceScatterTokens(torch.autograd.Function):
    """Reduce-scatter in the forward pass, all-gather in the backward pass."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis, ctx.tokens = axis, x.shape[0]
        return reduce_scatter_tokens(padded_rows(x, axis), axis)

    @staticmethod
    def backward(ctx, grad):
        return all_gather_tokens(grad, ctx.axis)[: ctx.tokens], None


class _AllReduce(torch.autograd.Function):
    """All-reduce in the forward pass and in the backward pass.

    The sum is used on every rank, so its gradient is the sum of the gradients of all ranks.
    """

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return all_reduce(x.clone(), axis)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad.clone(), ctx.axis), None


def all_reduce_with_gradient(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum ``x`` over the axis forward, and the gradients of all ranks backward."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis)


def gather_from_sequence_parallel_region(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """All-gather along the tokens forward, reduce-scatter the gradients backward.

    Args:
        x: [rows, features], with as many rows on every rank.

    Returns:
        [rows * size, features], the padding of the last ranks included.
    """
    return x if axis.size == 1 else _GatherTokens.apply(x, axis)


def reduce_scatter_to_sequence_parallel_region(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Reduce-scatter along the tokens forward, all-gather the gradients backward.

    Args:
        x: [t, features] for any t.

    Returns:
        [t / size, features], rounded up; rows beyond the last token are zero.
    """
    return x if axis.size == 1 else _ReduceScatterTokens.apply(x, axis)
