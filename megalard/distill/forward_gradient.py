"""Losses whose gradient is computed in the forward pass.

The gradient is kept for the backward pass in place of the loss's inputs. The teacher's tensors can
then be freed at once, and a layer that is computed again under activation checkpointing does not
repeat the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd.graph import saved_tensors_hooks

from megalard.model.fuse import fused_on_gpu

Compute = Callable[[bool], tuple[torch.Tensor, Sequence[torch.Tensor]]]


def with_forward_gradient(compute: Compute, *inputs: torch.Tensor) -> torch.Tensor:
    """Return ``compute``'s value, differentiable in ``inputs``.

    Args:
        compute: takes whether a gradient is needed. Returns the value, a scalar or a vector of
            which only the first element is differentiable, and the gradient of that element with
            respect to each input (nothing if no gradient is needed).
        inputs: the tensors that ``compute`` reads.
    """
    return _ForwardGradient.apply(compute, *inputs)


def with_autograd_now(
    loss: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """Return the scalar ``loss(x)``, whose gradient autograd computes now."""

    def compute(with_grad: bool) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        if not with_grad:
            return loss(x), ()
        # The tensors that this small graph saves stay on their device, also under offloading.
        with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            leaf = x.detach().requires_grad_()
            value = loss(leaf)
            grads = torch.autograd.grad(value, leaf)
        return value.detach(), grads

    return with_forward_gradient(compute, x)


class _ForwardGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute: Compute, *inputs: torch.Tensor):
        value, grads = compute(any(ctx.needs_input_grad[1:]))
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    def backward(ctx, grad):
        factor = grad if grad.ndim == 0 else grad[0]
        return None, *(scaled(saved, factor) for saved in ctx.saved_tensors)


@fused_on_gpu
def scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return x * factor, computed in fp32.

    A factor that is rounded to half precision would change every gradient in the same direction.
    """
    return (x.float() * factor).to(x.dtype)
