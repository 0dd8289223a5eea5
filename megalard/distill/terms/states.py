"""Losses on hidden states and attention outputs, summed over this rank's tokens and heads.

The gradient is computed in the forward pass, so that the teacher's states can be dropped at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from megalard.model.fuse import fused_on_gpu

# squared length of an attention output that counts as zero
_SMALLEST = 1e-12


def cosine_sum(
    student_th: torch.Tensor, teacher_th: torch.Tensor, valid_t: torch.Tensor
) -> torch.Tensor:
    """Σ over the valid tokens of 1 - cos(student, teacher), in fp32 (LongReD, 2502.07365, eq. 5).

    Args:
        student_th, teacher_th: hidden states [t, hidden].
        valid_t: bool [t].
    """

    def loss(x: torch.Tensor) -> torch.Tensor:
        similarity = F.cosine_similarity(x.float(), teacher_th.float(), dim=-1)
        return ((1 - similarity) * valid_t).sum()

    return _Differentiated.apply(loss, student_th)


def context_sum(
    student_bshd: torch.Tensor, teacher_bshd: torch.Tensor, valid_bs: torch.Tensor
) -> torch.Tensor:
    """Σ over valid tokens and heads of ‖student - teacher‖² / ‖teacher‖², in fp32.

    A head whose vector the teacher has (all but) zero, as where its values are, is left out there.

    Args:
        student_bshd, teacher_bshd: attention outputs A V [b, s, H, d].
        valid_bs: bool [b, s].
    """

    def loss(x: torch.Tensor) -> torch.Tensor:
        target = teacher_bshd.float()
        error = (x.float() - target).square().sum(-1)
        size = target.square().sum(-1)
        kept = valid_bs[..., None] & (size > _SMALLEST)
        return (error / torch.where(kept, size, 1.0) * kept).sum()

    return _Differentiated.apply(loss, student_bshd)


class _Differentiated(torch.autograd.Function):
    """loss(x), keeping its gradient instead of what the gradient needs."""

    @staticmethod
    def forward(ctx, loss: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor):
        if not ctx.needs_input_grad[1]:
            return loss(x)
        # what this small graph saves stays where it is, also under offloading
        with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            leaf = x.detach().requires_grad_()
            value = loss(leaf)
            (grad,) = torch.autograd.grad(value, leaf)
        ctx.save_for_backward(grad)
        return value.detach()

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        return None, scaled(saved, grad)


@fused_on_gpu
def scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x * factor in fp32: a factor rounded to half precision would shift every gradient alike."""
    return (x.float() * factor).to(x.dtype)
