"""Saved tensors in host memory: the same bits, less memory on the GPU, and nothing that waits."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megalard.training.activation_offload import AHEAD, ActivationOffload

pytestmark = pytest.mark.gpu
LAYERS, ROWS, FEATURES = 24, 4096, 1024
TENSOR = ROWS * FEATURES * 4


@pytest.fixture
def layers() -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    return [torch.nn.Linear(FEATURES, FEATURES, device="cuda") for _ in range(LAYERS)]


def run(layers, x, offload: ActivationOffload | None, again: bool, waits: bool = True):
    """Return the gradients of the layers and of x, and the bytes in use after the forward pass."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    leaf = x.detach().requires_grad_()

    def layer(x: torch.Tensor, linear: torch.nn.Linear) -> torch.Tensor:
        return torch.tanh(linear(x))

    torch.cuda.set_sync_debug_mode("default" if waits else "error")
    try:
        with offload.forward() if offload else torch.enable_grad():
            y = leaf
            for linear in layers:
                y = checkpoint(layer, y, linear, use_reentrant=False) if again else layer(y, linear)
            loss = y.square().mean()
        del y
        kept = torch.cuda.memory_allocated() - before
        grads = torch.autograd.grad(loss, [leaf, *(linear.weight for linear in layers)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return grads, kept


@pytest.mark.parametrize("again", [True, False])
def test_gradients_are_the_same_bits_and_little_is_kept(layers, again):
    offload = ActivationOffload(torch.device("cuda", torch.cuda.current_device()))
    for number in range(3):
        x = torch.randn(ROWS, FEATURES, device="cuda")
        expected, kept = run(layers, x, None, again)
        actual, kept_offloaded = run(layers, x, offload, again)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), number
        assert kept > (LAYERS - 1) * TENSOR
        assert kept_offloaded <= (AHEAD + 2) * TENSOR
        del expected, actual


def test_the_host_does_not_wait_for_the_whole_step(layers):
    offload = ActivationOffload(torch.device("cuda", torch.cuda.current_device()))
    x = torch.randn(ROWS, FEATURES, device="cuda")
    run(layers, x, offload, True)
    run(layers, x, offload, True, waits=False)


def test_tensors_may_be_read_in_another_order_twice_or_never(layers):
    offload = ActivationOffload(torch.device("cuda", torch.cuda.current_device()))
    x = torch.randn(ROWS, FEATURES, device="cuda", requires_grad=True)
    with offload.forward():
        parts = [layer(x).sigmoid().sum() for layer in layers]
    for number in (5, 0, LAYERS - 1, 5):
        weight = layers[number].weight
        (actual,) = torch.autograd.grad(parts[number], weight, retain_graph=True)
        (expected,) = torch.autograd.grad(layers[number](x).sigmoid().sum(), weight)
        assert torch.equal(actual, expected), number
    del parts
    torch.cuda.synchronize()


def test_parameters_stay_on_the_gpu():
    offload = ActivationOffload(torch.device("cuda", torch.cuda.current_device()))
    weight = torch.nn.Parameter(torch.randn(64, 64, device="cuda"), requires_grad=False)
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    with offload.forward():
        y = x @ weight.t()
    assert y.grad_fn._saved_mat2.data_ptr() == weight.data_ptr()
