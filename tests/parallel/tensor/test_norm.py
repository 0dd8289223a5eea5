"""The norm over features of several ranks against the norm in one process."""

from __future__ import annotations

import torch

from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.parallel.tensor.norm import rms_norm_over_axis
from tests.ranks import run_ranks

EPS = 0.05


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last dim."""
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def inputs(features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x [3, features], the weight and the gradient of the output."""
    generator = torch.Generator().manual_seed(features)
    x, upstream = (torch.randn(3, features, generator=generator) for _ in range(2))
    return x, torch.rand(features, generator=generator) + 0.5, upstream


def test_a_single_rank_computes_the_plain_norm():
    x, weight, _ = inputs(8)
    torch.testing.assert_close(rms_norm_over_axis(x, weight, EPS, 8, SINGLE), rms(x, weight))


def _check_norms() -> None:
    axis = build_mesh("cpu", 4).tp
    # 8 features over 4 ranks; and over 2, so that two neighboring ranks hold the same features.
    for replicas in (1, 2):
        x, weight, upstream = inputs(8)
        owner, local = axis.rank // replicas, 8 // (4 // replicas)
        columns = slice(owner * local, (owner + 1) * local)
        full = x.clone().requires_grad_()
        expected = rms(full, weight)
        (gradient,) = torch.autograd.grad(expected, full, upstream)
        leaf = x[:, columns].clone().requires_grad_()
        out = rms_norm_over_axis(leaf, weight[columns], EPS, 8, axis)
        torch.testing.assert_close(out, expected[:, columns].detach())
        # Replicas each get a part of the gradient, which sums to the full one over them.
        (ours,) = torch.autograd.grad(out, leaf, upstream[:, columns] / replicas)
        torch.testing.assert_close(ours * replicas, gradient[:, columns], msg=str(replicas))


def test_four_ranks_compute_the_norm_of_all_features():
    run_ranks(4, _check_norms)
