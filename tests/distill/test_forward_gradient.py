"""Gradients that are computed in the forward pass, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megalard.distill.forward_gradient import scaled, with_autograd_now, with_forward_gradient


def product(calls: list[bool]):
    """Return a function that computes x · y with its gradients, and notes each call."""

    def of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        def compute(with_grad: bool):
            calls.append(with_grad)
            return (x.detach() * y.detach()).sum(), [y.detach(), x.detach()] if with_grad else ()

        return with_forward_gradient(compute, x, y)

    return of


def test_the_given_gradients_are_scaled_by_the_upstream_gradient():
    calls: list[bool] = []
    x, y = torch.randn(2, 5, dtype=torch.float64).unbind()
    x.requires_grad_(), y.requires_grad_()
    value = product(calls)(x, y)
    assert value.item() == pytest.approx(float((x * y).sum().detach()))
    (3 * value).backward()
    torch.testing.assert_close(x.grad, 3 * y.detach())
    torch.testing.assert_close(y.grad, 3 * x.detach())
    assert calls == [True]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_gradients_are_computed_only_if_an_input_needs_one(needs_grad):
    calls: list[bool] = []
    value = product(calls)(torch.randn(5, requires_grad=needs_grad), torch.randn(5))
    assert calls == [needs_grad] and value.requires_grad == needs_grad


def test_only_the_first_element_of_a_vector_is_differentiable():
    """The others are figures to report."""
    x = torch.tensor([2.0], requires_grad=True)

    def compute(with_grad: bool):
        return torch.stack([x.detach()[0] ** 2, torch.tensor(7.0)]), [2 * x.detach()]

    loss, figure = with_forward_gradient(compute, x).unbind()
    assert (loss.item(), figure.item()) == (4, 7)
    (loss + 100 * figure).backward()
    assert x.grad.item() == 4


def loss(x: torch.Tensor) -> torch.Tensor:
    """Return some function of x."""
    return (x.sin() * x.flip(0)).sum()


def test_autograd_now_gives_the_value_and_gradient_of_autograd():
    x = torch.randn(6, dtype=torch.float64)
    ours, plain = (x.clone().requires_grad_() for _ in range(2))
    value = with_autograd_now(loss, ours)
    (0.25 * value).backward()
    (0.25 * loss(plain)).backward()
    torch.testing.assert_close(value, loss(x))
    torch.testing.assert_close(ours.grad, plain.grad)
    with torch.no_grad():
        torch.testing.assert_close(with_autograd_now(loss, ours), loss(x))


def test_the_graph_is_freed_in_the_forward_pass():
    """Only the gradient is kept, under activation checkpointing too."""
    saved: list[torch.Tensor] = []
    x = torch.randn(6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = with_autograd_now(loss, x)
    assert len(saved) == 1 and saved[0].shape == x.shape
    value.backward()
    assert torch.equal(x.grad, saved[0])


def test_checkpointing_gives_the_same_gradient():
    x = torch.randn(6, requires_grad=True)
    y = checkpoint(lambda x: with_autograd_now(loss, 2 * x), x, use_reentrant=False)
    y.backward()
    plain = x.detach().clone().requires_grad_()
    loss(2 * plain).backward()
    torch.testing.assert_close(x.grad, plain.grad)


def test_scaling_is_computed_in_fp32_and_rounded_once():
    """A factor of 1.003 is 1 in bfloat16. Rounded, it would change every gradient the same way."""
    x = (1 + torch.arange(128) / 128).bfloat16()
    factor = torch.tensor(1.003)
    result = scaled(x, factor)
    assert result.dtype == torch.bfloat16 and factor.bfloat16() == 1
    assert torch.equal(result, (x.double() * 1.003).to(torch.bfloat16))
    assert not torch.equal(result, x)
