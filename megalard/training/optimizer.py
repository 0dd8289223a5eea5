"""AdamW on fp32 weights, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megalard.config.schema import OptimizerConfig
from megalard.training import apex_adamw


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, device: torch.device
) -> torch.optim.AdamW:
    """Return AdamW with apex's update where that is installed and faster, or with torch's."""
    settings: dict[str, Any] = dict(
        lr=config.learning_rate,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if apex_adamw.is_chosen(device):
        return apex_adamw.ApexAdamW(list(parameters), **settings)
    return torch.optim.AdamW(list(parameters), fused=True, **settings)


def update_where(finite: torch.Tensor, optimizer: torch.optim.AdamW) -> None:
    """Update the parameters if ``finite`` is true. The GPU reads the flag; the host does not wait.

    Args:
        finite: a bool scalar. If the parameters are in host memory, the host waits for it.
    """
    # The flag that torch.amp.GradScaler sets: with 1, parameters and state do not change.
    device = optimizer.param_groups[0]["params"][0].device
    optimizer.found_inf = 1.0 - finite.float().to(device)  # type: ignore[attr-defined]
    optimizer.step()


def continue_optimizer(optimizer: torch.optim.AdamW, before: torch.optim.AdamW) -> None:
    """Give a new optimizer the state of one of the same parameters, which stays usable."""
    optimizer.state.update(before.state)


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step, counted from 0.

    A linear warm-up starts above zero and reaches the peak at its last step. A cosine follows and
    ends at ``min_ratio`` of the peak at the last step of the run. With ``start_at_zero`` every step
    has the rate of the step before it, and the first has zero.
    """
    place = step if config.start_at_zero else step + 1
    if config.warmup_steps and place <= config.warmup_steps:
        return config.learning_rate * place / config.warmup_steps
    decay_steps = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (place - config.warmup_steps) / decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_ratio + (1 - config.min_ratio) * cosine)
