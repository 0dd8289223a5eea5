"""The learning rate is a pure function of the step, and AdamW has the configured settings."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from megalard.config.schema import OptimizerConfig
from megalard.training.optimizer import (
    learning_rate,
    make_optimizer,
    update_where,
)


def rates(**settings) -> list[float]:
    """Return the learning rate of every step."""
    config = OptimizerConfig(**settings)
    return [learning_rate(step, config) for step in range(config.steps)]


def test_the_schedule_is_this():
    """Written out: two steps of warm-up, then four of a cosine from 1 to 0.2 of the peak.

    The cosine of quarters of pi is 0.8536, 0.5, 0.1464 and 0 of the way down from the peak.
    """
    settings = {"learning_rate": 10.0, "warmup_steps": 2, "steps": 6, "min_ratio": 0.2}
    assert rates(**settings) == pytest.approx([5.0, 10.0, 8.828427, 6.0, 3.171573, 2.0])
    # The authors' schedule begins one step earlier, at zero, and does not reach the end.
    shifted = rates(**settings, start_at_zero=True)
    assert shifted == pytest.approx([0.0, 5.0, 10.0, 8.828427, 6.0, 3.171573])


def test_the_published_schedule_is_transformers_cosine():
    """The authors use LambdaLR with a warm-up of 4 steps and a cosine down to 0.9 of the peak."""
    config = OptimizerConfig(start_at_zero=True)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=config.learning_rate)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
        min_lr_rate=config.min_ratio,
    )
    for step in range(config.steps):
        assert learning_rate(step, config) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_warm_up_starts_above_zero_and_reaches_the_peak_at_its_last_step():
    actual = rates(learning_rate=1e-3, warmup_steps=4, steps=20, min_ratio=0.1)
    assert actual[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert max(actual) == actual[3]


@pytest.mark.parametrize("ratio", [0.0, 0.9, 1.0])
def test_the_cosine_ends_at_the_minimum_with_the_last_step(ratio):
    actual = rates(learning_rate=2e-5, warmup_steps=4, steps=144, min_ratio=ratio)
    assert actual[-1] == pytest.approx(2e-5 * ratio)
    assert all(a >= b for a, b in pairwise(actual[3:]))
    middle = 2e-5 * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * 70 / 140)))
    assert actual[73] == pytest.approx(middle)


def test_without_warm_up_the_first_step_is_near_the_peak():
    actual = rates(learning_rate=1.0, warmup_steps=0, steps=10, min_ratio=0.0)
    assert actual[0] == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)))
    assert actual[-1] == pytest.approx(0)


def test_a_run_may_be_all_warm_up():
    assert rates(learning_rate=1.0, warmup_steps=4, steps=2) == [0.25, 0.5]
    assert rates(learning_rate=1.0, warmup_steps=2, steps=2) == [0.5, 1.0]


def test_steps_beyond_the_last_stay_at_the_minimum():
    config = OptimizerConfig(steps=10, learning_rate=1.0, warmup_steps=2, min_ratio=0.5)
    assert learning_rate(25, config) == pytest.approx(0.5)


def test_the_optimizer_has_the_configured_settings():
    config = OptimizerConfig(
        learning_rate=1e-3, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.1, warmup_steps=0
    )
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([weight], config, torch.device("cpu"))
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.9), 1e-6)
    weight.grad = torch.full((3,), 2.0)
    optimizer.step()
    # AdamW's first step: decay by lr * 0.1, then lr * sign(gradient).
    torch.testing.assert_close(weight.data, torch.full((3,), 1 - 1e-4 - 1e-3))


def trained(generator: torch.Generator) -> torch.nn.Parameter:
    """Return a random parameter with a random gradient."""
    parameter = torch.nn.Parameter(torch.randn(37, generator=generator))
    parameter.grad = torch.randn(37, generator=generator)
    return parameter


def test_an_update_that_is_not_finite_changes_nothing():
    """Parameters, moments and step count are bit for bit as in a run without the update."""
    pairs = []
    for finite in ([True, True], [True, False, True]):
        parameter = trained(torch.Generator().manual_seed(1))
        optimizer = make_optimizer([parameter], OptimizerConfig(), torch.device("cpu"))
        gradient = parameter.grad.clone()
        for number, good in enumerate(finite):
            parameter.grad.copy_(gradient if number == 0 else gradient.flip(0))
            if not good:
                parameter.grad[3] = torch.nan
            update_where(torch.tensor(good), optimizer)
        pairs.append([parameter.detach(), *optimizer.state[parameter].values()])
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
