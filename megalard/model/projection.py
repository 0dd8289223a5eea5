"""A linear layer's parameters, with the LoRA pair that training may add."""

from __future__ import annotations

import torch
from torch import nn


class Projection(nn.Module):
    """The weight [out, in] and bias [out] of a linear layer, and its LoRA pair if it has one."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.lora_scale = 0.0
        self.lora_dropout: nn.Module | None = None
