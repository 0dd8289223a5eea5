"""AdamW on fp32 masters, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from megalard.config.schema import OptimizerConfig

try:
    from apex.optimizers import FusedAdam
except ImportError:
    FusedAdam = None


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """apex's FusedAdam where it is installed and there is a GPU, else torch's fused AdamW."""
    settings = dict(
        lr=config.learning_rate,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if FusedAdam is not None and device.type == "cuda":
        return FusedAdam(list(parameters), adam_w_mode=True, set_grad_none=False, **settings)
    return torch.optim.AdamW(list(parameters), fused=True, **settings)


def update_where(finite: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step if ``finite``, a bool scalar on the parameters' device.

    torch's optimizer reads it there; apex's is called or not, so that the host waits for it.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        # the flag that torch.amp.GradScaler sets: 1 leaves parameters and state as they are
        optimizer.found_inf = 1.0 - finite.float()
        optimizer.step()
    elif finite:
        optimizer.step()


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Rate of optimizer step ``step`` (from 0).

    A linear warm-up that reaches the peak at its last step and starts above zero, then a cosine
    that ends at ``min_ratio`` of the peak with the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps + 1) / decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_ratio + (1 - config.min_ratio) * cosine)
