"""The root-mean-square norm, over the features of a token, of one head, or of all heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megalard.gpu import is_hopper

try:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine as apex_rms_norm
except ImportError:
    apex_rms_norm = None


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dim (Zhang and Sennrich, arXiv 1910.07467), in fp32."""

    def __init__(self, features: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype)
        # On Hopper torch's kernel is faster and rounds less (docs/packages.md).
        if apex_rms_norm is not None and x.is_cuda and not is_hopper(x.device):
            return apex_rms_norm(x, weight, weight.shape, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)
