"""Row statistics over a vocabulary that is spread over the tp ranks.

Logits are [rows, vocab/tp] on each rank (the last ranks may hold fewer columns, or none); results
are [rows] in fp32 and the same on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Axis


def log_sum_exp(logits: torch.Tensor, axis: Axis) -> torch.Tensor:
    """log Σ_v exp(logits[:, v]) over the whole vocabulary. No autograd."""
    largest = all_reduce(_row_max(logits), axis, dist.ReduceOp.MAX)
    total = all_reduce((logits - largest[:, None]).exp().sum(dim=1), axis)
    return largest + total.log()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, first, axis):
        local = target - first
        mine = (local >= 0) & (local < logits.shape[1])
        if logits.shape[1]:
            local = local.masked_fill(~mine, 0)[:, None]
            picked = logits.gather(1, local)[:, 0] * mine
        else:
            picked = logits.new_zeros(logits.shape[0])
        lse = log_sum_exp(logits, axis)
        if ctx.needs_input_grad[0]:
            difference = (logits - lse[:, None]).exp()
            if logits.shape[1]:
                difference.scatter_add_(1, local, -mine[:, None].to(difference.dtype))
            ctx.save_for_backward(difference)
        return lse - all_reduce(picked, axis)

    @staticmethod
    def backward(ctx, grad):
        (difference,) = ctx.saved_tensors
        return grad[:, None] * difference, None, None, None


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, first: int, axis: Axis
) -> torch.Tensor:
    """-log softmax(logits)[target] of each row, differentiable in the logits.

    The gradient with respect to this rank's columns is p - 1[target] there, so the backward pass
    needs no exchange.

    Args:
        logits: [rows, vocab/tp] in fp32, this rank's columns from ``first``.
        target: int64 [rows], ids in the whole vocabulary.
    """
    return _CrossEntropy.apply(logits, target, first, axis)


def arg_max(logits: torch.Tensor, first: int, axis: Axis) -> torch.Tensor:
    """The id of the largest logit of each row, the smallest such id on a tie."""
    largest = _row_max(logits)
    best = all_reduce(largest.clone(), axis, dist.ReduceOp.MAX)
    none = torch.iinfo(torch.int64).max
    if logits.shape[1]:
        index = torch.where(largest == best, logits.argmax(dim=1) + first, none)
    else:
        index = torch.full_like(best, none, dtype=torch.int64)
    return all_reduce(index, axis, dist.ReduceOp.MIN)


class _Kl(torch.autograd.Function):
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
    """KL(teacher || student) of each row, differentiable in the student's logits (fp32).

    The gradient of a row with respect to this rank's columns is p_s - p_t there, so the backward
    pass needs no exchange.
    """
    return _Kl.apply(student, teacher, axis)


def _row_max(logits: torch.Tensor) -> torch.Tensor:
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0],), float("-inf"))
    return logits.amax(dim=1)
