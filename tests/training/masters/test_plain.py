"""Plain masters: gradients in one tensor, and their sums over the ranks that hold a parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.training.masters.plain import PlainMasters
from tests.ranks import run_ranks


def make_parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


def test_gradients_are_views_of_one_tensor_and_are_accumulated_there():
    trained = make_parameters({"a": (2, 3), "b": (5,)})
    masters = PlainMasters({1: [*trained.values()]}, {1: SINGLE}, torch.device("cpu"))
    for _ in range(2):
        (trained["a"].sum() * 2 + trained["b"].sum() * 3).backward()
    assert masters.gradient.tolist() == [4.0] * 6 + [6.0] * 5
    assert trained["a"].grad.shape == (2, 3)
    masters.gradient.zero_()
    assert not any(parameter.grad.any() for parameter in trained.values())


def _check_sums() -> None:
    """Four ranks: dp 2 and tp 2 of eight heads, then tp 4 with two K/V heads on two ranks each."""
    mesh = build_mesh("cpu", 2)
    rank = mesh.world.rank
    trained = make_parameters({"split": (2,), "whole": (2,)})
    holders = {count: mesh.holders(count) for count in (1, 2)}
    masters = PlainMasters({1: [trained["split"]], 2: [trained["whole"]]}, holders, mesh.device)
    for parameter in trained.values():
        parameter.grad.fill_(10.0**rank)
    masters.reduce()
    # Ranks 0 and 2 (dp) hold the same slice; all four hold the whole one and each has a part of it.
    split = {0: 101.0, 1: 1010.0}[mesh.tp.rank]
    assert trained["split"].grad.tolist() == [split] * 2
    assert trained["whole"].grad.tolist() == [1111.0] * 2
    # Each element of the full tensors counts once.
    square = 2 * 101.0**2 + 2 * 1010.0**2 + 2 * 1111.0**2
    assert all_reduce(masters.square(), mesh.tp).item() == pytest.approx(square)

    mesh = build_mesh("cpu", 4)
    trained = make_parameters({"kv": (1,), "whole": (1,), "split": (1,)})
    holders = {count: mesh.holders(count) for count in (1, 2, 4)}
    by_replicas = {2: [trained["kv"]], 4: [trained["whole"]], 1: [trained["split"]]}
    masters = PlainMasters(by_replicas, holders, mesh.device)
    for parameter in trained.values():
        parameter.grad.fill_(10.0**rank)
    masters.reduce()
    assert trained["kv"].grad.item() == (11.0 if rank < 2 else 1100.0)
    assert trained["whole"].grad.item() == 1111.0
    assert trained["split"].grad.item() == 10.0**rank
    square = 11.0**2 + 1100.0**2 + 1111.0**2 + sum(10.0 ** (2 * r) for r in range(4))
    assert all_reduce(masters.square(), mesh.tp).item() == pytest.approx(square)


def test_gradients_are_summed_over_the_ranks_that_hold_a_parameter():
    run_ranks(4, _check_sums)
