"""Statistics of rows of logits whose vocabulary is split over the tp ranks.

Logits are [rows, vocab/tp] on each rank; the last ranks may hold fewer columns, or none. Results
are fp32 [rows], the same on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Axis


def log_sum_exp(logits: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return log Σ_v exp(logits[:, v]) over the full vocabulary. No autograd."""
    largest = all_reduce(_row_max(logits), axis, dist.ReduceOp.MAX)
    total = all_reduce((logits - largest[:, None]).exp().sum(dim=1), axis)
    return largest + total.log()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, first_id, axis):
        local_id = target - first_id
        is_local = (local_id >= 0) & (local_id < logits.shape[1])
        if logits.shape[1]:
            local_id = local_id.masked_fill(~is_local, 0)[:, None]
            target_logit = logits.gather(1, local_id)[:, 0] * is_local
        else:
            target_logit = logits.new_zeros(logits.shape[0])
        lse = log_sum_exp(logits, axis)
        if ctx.needs_input_grad[0]:
            difference = (logits - lse[:, None]).exp()
            if logits.shape[1]:
                difference.scatter_add_(1, local_id, -is_local[:, None].to(difference.dtype))
            ctx.save_for_backward(difference)
        return lse - all_reduce(target_logit, axis)

    @staticmethod
    def backward(ctx, grad):
        (difference,) = ctx.saved_tensors
        return grad[:, None] * difference, None, None, None


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, first_id: int, axis: Axis
) -> torch.Tensor:
    """Return -log softmax(logits)[target] of each row, differentiable in the logits.

    The gradient with respect to this rank's columns is p - 1[target] there, so that the backward
    pass needs no exchange.

    Args:
        logits: fp32 [rows, vocab/tp], the columns of the token ids from ``first_id``.
        target: int64 [rows], token ids.
    """
    return _CrossEntropy.apply(logits, target, first_id, axis)


def arg_max(logits: torch.Tensor, first_id: int, axis: Axis) -> torch.Tensor:
    """Return the id of the largest logit of each row, int64; the smallest id if several tie."""
    largest = _row_max(logits)
    best = all_reduce(largest.clone(), axis, dist.ReduceOp.MAX)
    no_id = torch.iinfo(torch.int64).max
    if logits.shape[1]:
        index = torch.where(largest == best, logits.argmax(dim=1) + first_id, no_id)
    else:
        index = torch.full_like(best, no_id, dtype=torch.int64)
    return all_reduce(index, axis, dist.ReduceOp.MIN)


class _KlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, axis):
        log_s = student - log_sum_exp(student, axis)[:, None]
        log_t = teacher - log_sum_exp(teacher, axis)[:, None]
        p_t = log_t.exp()
        ctx.save_for_backward(log_s.exp() - p_t)
        return all_reduce((p_t * (log_t - log_s)).sum(dim=1), axis)

    @staticmethod
    def backward(ctx, grad):
        (difference,) = ctx.saved_tensors
        return grad[:, None] * difference, None, None


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return KL(teacher || student) of each row in nats, differentiable in the student's logits.

    The gradient with respect to this rank's columns is p_s - p_t there, so that the backward pass
    needs no exchange.

    Args:
        student, teacher: fp32 logits [rows, vocab/tp].
        axis: the tp axis.
    """
    return _KlDivergence.apply(student, teacher, axis)


def _row_max(logits: torch.Tensor) -> torch.Tensor:
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0],), float("-inf"))
    return logits.amax(dim=1)
