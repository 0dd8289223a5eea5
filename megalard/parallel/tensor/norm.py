"""A norm over features that are split over the tensor-parallel axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalard.parallel.collectives import all_reduce_with_gradient
from megalard.parallel.mesh import Axis


def rms_norm_over_axis(
    x: torch.Tensor, weight: torch.Tensor, eps: float, features: int, axis: Axis
) -> torch.Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight, with the mean over the features of all ranks.

    One fp32 number per token is all-reduced, forward and backward.

    Args:
        x: [t, n], this rank's features. Where n * axis.size exceeds ``features``, neighboring ranks
            hold the same features, which count once.
        weight: [n].
        features: the number of features over which the mean is taken.
        axis: the tp axis.
    """
    weight = weight.to(x.dtype)
    if axis.size == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    replicas = x.shape[-1] * axis.size // features
    # One copy of x in fp32 serves both uses, so that autograd keeps one tensor and not two.
    x_fp32 = x.float()
    squares = x_fp32.square().sum(-1, keepdim=True)
    mean = all_reduce_with_gradient(squares, axis) / (replicas * features)
    return (x_fp32 * torch.rsqrt(mean + eps) * weight).to(x.dtype)
