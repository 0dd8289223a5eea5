"""The gradient buffer: sums over the ranks that hold a parameter, one norm, and clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalard.model.layout import Layout, full_layout
from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.training.gradients import GradientBuffer
from tests.ranks import run_ranks


def make_parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


def test_gradients_are_views_of_one_buffer_and_are_accumulated_there():
    trained = make_parameters({"a": (2, 3), "b": (5,)})
    layouts = {name: full_layout(tuple(p.shape)) for name, p in trained.items()}
    buffer = GradientBuffer(trained, layouts, build_mesh("cpu", 1), SINGLE)
    for _ in range(2):
        (trained["a"].sum() * 2 + trained["b"].sum() * 3).backward()
    assert buffer.flat.tolist() == [4.0] * 6 + [6.0] * 5
    assert trained["a"].grad.shape == (2, 3)
    buffer.zero()
    assert not any(parameter.grad.any() for parameter in trained.values())


@pytest.mark.parametrize("largest", [1.0, 100.0])
def test_norm_and_clipping_are_torch_s(largest):
    torch.manual_seed(0)
    trained = make_parameters({"a": (4, 3), "b": (7,)})
    layouts = {name: full_layout(tuple(p.shape)) for name, p in trained.items()}
    buffer = GradientBuffer(trained, layouts, build_mesh("cpu", 1), SINGLE)
    copies = make_parameters({"a": (4, 3), "b": (7,)})
    for name, parameter in trained.items():
        parameter.grad.normal_()
        copies[name].grad = parameter.grad.clone()
    expected = nn.utils.clip_grad_norm_(copies.values(), largest)
    norm = buffer.norm()
    torch.testing.assert_close(norm, expected)
    buffer.clip(norm, largest)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, copies[name].grad)


def test_a_norm_that_is_not_finite_clips_nothing():
    trained = make_parameters({"a": (3,)})
    buffer = GradientBuffer(trained, {"a": full_layout((3,))}, build_mesh("cpu", 1), SINGLE)
    trained["a"].grad.copy_(torch.tensor([1.0, float("nan"), 2.0]))
    buffer.clip(buffer.norm(), 1.0)
    assert trained["a"].grad[::2].tolist() == [1.0, 2.0]


def _check_sums() -> None:
    """Four ranks: dp 2 and tp 2 of eight heads, then tp 4 with two K/V heads on two ranks each."""
    mesh = build_mesh("cpu", 2)
    rank = mesh.world.rank
    trained = make_parameters({"split": (2,), "whole": (2,)})
    layouts = {"split": Layout((4,), 0, 2 * mesh.tp.rank, 2, 1), "whole": full_layout((2,), 2)}
    buffer = GradientBuffer(trained, layouts, mesh, SINGLE)
    for parameter in trained.values():
        parameter.grad.fill_(10.0**rank)
    buffer.reduce()
    # Ranks 0 and 2 (dp) hold the same slice; all four hold the whole one and each has a part of it.
    split = {0: 101.0, 1: 1010.0}[mesh.tp.rank]
    assert trained["split"].grad.tolist() == [split] * 2
    assert trained["whole"].grad.tolist() == [1111.0] * 2
    # Each element of the full tensors counts once.
    square = 2 * 101.0**2 + 2 * 1010.0**2 + 2 * 1111.0**2
    assert buffer.norm().item() == pytest.approx(square**0.5)

    mesh = build_mesh("cpu", 4)
    trained = make_parameters({"kv": (1,), "whole": (1,), "split": (1,)})
    layouts = {
        "kv": Layout((2,), 0, rank // 2, 1, 2),
        "whole": full_layout((1,), 4),
        "split": Layout((4,), 0, rank, 1, 1),
    }
    buffer = GradientBuffer(trained, layouts, mesh, mesh.replicas(2))
    for parameter in trained.values():
        parameter.grad.fill_(10.0**rank)
    buffer.reduce()
    assert trained["kv"].grad.item() == (11.0 if rank < 2 else 1100.0)
    assert trained["whole"].grad.item() == 1111.0
    assert trained["split"].grad.item() == 10.0**rank
    square = 11.0**2 + 1100.0**2 + 1111.0**2 + sum(10.0 ** (2 * r) for r in range(4))
    assert buffer.norm().item() == pytest.approx(square**0.5)


def test_gradients_are_summed_over_the_ranks_that_hold_a_parameter():
    run_ranks(4, _check_sums)
