"""apex's update with a stand-in for its kernel, and with the kernel itself on a GPU.

The stand-in follows Loshchilov and Hutter (arXiv 1711.05101), and checks what the kernel of apex
demands of its arguments.
"""

from __future__ import annotations

import copy

import pytest
import torch

from megalard import gpu
from megalard.config.schema import OptimizerConfig
from megalard.training import apex_adamw
from megalard.training.optimizer import continue_optimizer, make_optimizer, update_where

CONFIG = OptimizerConfig(learning_rate=0.05, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.1)


def adam_capturable(
    chunk_size: int,
    noop: torch.Tensor,
    lists: list[list[torch.Tensor]],
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: torch.Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inverse_scale: torch.Tensor,
) -> None:
    assert chunk_size == 2048 * 32
    assert (mode, int(bias_correction)) == (1, 1)
    for scalar, dtype in (
        (noop, torch.int32),
        (lr, torch.float32),
        (step, torch.int32),
        (inverse_scale, torch.float32),
    ):
        assert (scalar.shape, scalar.dtype) == ((1,), dtype)
    gradients, weights, means, squares = lists
    assert {x.dtype for group in lists for x in group} == {torch.float32}
    assert all(x.is_contiguous() for group in lists for x in group)
    if noop:
        return
    for g, w, m, v in zip(gradients, weights, means, squares, strict=True):
        g = g * inverse_scale
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        w.sub_(lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * w))


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch):
    """Install the stand-in, for parameters on the CPU."""

    def apply(kernel, noop, lists, *arguments):
        kernel(2048 * 32, noop, lists, *arguments)

    monkeypatch.setattr(apex_adamw, "multi_tensor_adam_capturable", adam_capturable)
    monkeypatch.setattr(apex_adamw, "multi_tensor_applier", apply)
    monkeypatch.setattr(apex_adamw, "is_chosen", lambda device: True)


def parameters(device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((4, 5), (7,), (1,))
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes
    ]


def run(optimizer: torch.optim.AdamW, finite: list[bool], first: int = 0) -> None:
    """Take one step per flag, with gradients that depend on the number of the step alone."""
    group = optimizer.param_groups[0]
    for number, good in enumerate(finite, first):
        group["lr"] = 0.05 / (1 + number)
        generator = torch.Generator().manual_seed(number)
        for parameter in group["params"]:
            value = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (value if good else value * torch.nan).to(parameter.device)
        update_where(torch.tensor(good, device=parameter.device), optimizer)


def assert_same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    pairs = zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        states = one.state[a], other.state[b]
        assert states[0].keys() == states[1].keys()
        for key in states[0]:
            torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("finite", [[True] * 4, [False, True, True], [True, False, False, True]])
def test_updates_are_those_of_torch(finite: list[bool], apex: None):
    """A step that is left out is not counted, the first one included."""
    ours = make_optimizer(parameters(), CONFIG, torch.device("cpu"))
    assert isinstance(ours, apex_adamw.ApexAdamW)
    settings = dict(lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    reference = torch.optim.AdamW(parameters(), **settings)
    run(ours, finite)
    for number, good in enumerate(finite):
        if good:
            reference.param_groups[0]["lr"] = 0.05 / (1 + number)
            generator = torch.Generator().manual_seed(number)
            for parameter in reference.param_groups[0]["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            reference.step()
    assert_same_state(ours, reference)


@pytest.mark.parametrize("apex_is_first", [True, False])
def test_a_run_goes_on_with_the_other_optimizer(
    apex_is_first: bool, apex: None, monkeypatch: pytest.MonkeyPatch
):
    """By a checkpoint, and from stage to stage."""
    weights = parameters()
    whole = torch.optim.AdamW(parameters(), fused=True, lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    whole.param_groups[0]["weight_decay"] = 0.1
    run(whole, [True] * 4)
    monkeypatch.setattr(apex_adamw, "is_chosen", lambda device: apex_is_first)
    first = make_optimizer(weights, CONFIG, torch.device("cpu"))
    run(first, [True, True])
    monkeypatch.setattr(apex_adamw, "is_chosen", lambda device: not apex_is_first)
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = make_optimizer(copies, CONFIG, torch.device("cpu"))
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    continued = make_optimizer(weights, CONFIG, torch.device("cpu"))
    continue_optimizer(continued, first)
    assert type(first) is not type(continued)
    for optimizer in (resumed, continued):
        run(optimizer, [True, True], first=2)
        assert_same_state(optimizer, whole)


def test_torch_is_used_without_apex_on_a_cpu_and_on_hopper(monkeypatch: pytest.MonkeyPatch):
    optimizer = make_optimizer(parameters(), CONFIG, torch.device("cpu"))
    assert type(optimizer) is torch.optim.AdamW
    monkeypatch.setattr(apex_adamw, "multi_tensor_adam_capturable", adam_capturable)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (device.index, 0))
    chosen = [apex_adamw.is_chosen(torch.device("cuda", index)) for index in (8, 9, 10)]
    assert chosen == [True, False, True] and not apex_adamw.is_chosen(torch.device("cpu"))
    gpu.is_hopper.cache_clear()


@pytest.mark.gpu
def test_updates_on_a_gpu_are_those_of_torch_and_wait_for_nothing():
    pytest.importorskip("amp_C", reason="apex is not installed with its CUDA extensions")
    device = torch.device("cuda")
    settings = dict(lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    ours = apex_adamw.ApexAdamW(parameters("cuda"), **settings)
    reference = torch.optim.AdamW(parameters("cuda"), fused=True, **settings)
    for optimizer in (ours, reference):
        run(optimizer, [False, True, True, False, True])
    assert_same_state(ours, reference)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update_where(torch.ones((), dtype=torch.bool, device=device), ours)
    finally:
        torch.cuda.set_sync_debug_mode("default")
