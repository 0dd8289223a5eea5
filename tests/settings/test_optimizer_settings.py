"""optimizer: the schedule as numbers, and every update as torch's AdamW makes it."""

from __future__ import annotations

import math

import pytest
import torch

from tests.settings.tiny_run import CONTEXT, STEPS, TinyRun

RATE = 1e-2
PUBLISHED = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


def rates(run: TinyRun) -> list[float]:
    """Return the learning rates as reported."""
    return [line["learning_rate"] for line in run.metrics]


def cosine(share: float, min_ratio: float) -> float:
    return RATE * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share)))


def assert_updated(run: TinyRun, clip: float = 5.0, **settings) -> None:
    """Repeat all updates with torch's plain AdamW from the gradients and rates of the run."""
    first = run.steps[0].before
    leaves = {name: value.clone().requires_grad_() for name, value in first.items()}
    options = {**PUBLISHED, **settings}
    optimizer = torch.optim.AdamW(list(leaves.values()), lr=1.0, foreach=False, **options)
    for step, rate in zip(run.steps, rates(run), strict=True):
        norm = math.sqrt(sum(float((g**2).sum()) for g in step.gradients.values()))
        assert step.result.gradient_norm == pytest.approx(norm, rel=1e-5)
        scale = min(1.0, clip / norm) if clip else 1.0
        for name, leaf in leaves.items():
            leaf.grad = step.gradients[name] * scale
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, leaf in leaves.items():
            # The updates are about RATE; fused and plain AdamW round differently.
            torch.testing.assert_close(step.after[name], leaf.detach(), rtol=1e-4, atol=1e-2 * RATE)


def test_optimizer_steps(run):
    assert [line["step"] for line in run().metrics] == [1, 2, 3]
    longer = run("optimizer.steps=5")
    assert [line["step"] for line in longer.metrics] == [1, 2, 3, 4, 5] and len(longer.steps) == 5
    assert_updated(run())


def test_optimizer_learning_rate(run):
    slower = run("optimizer.learning_rate=1e-3")
    assert rates(slower) == pytest.approx([rate / 10 for rate in rates(run())])
    assert_updated(slower)


def test_optimizer_warmup_steps(run):
    warm = run("optimizer.warmup_steps=2", "optimizer.steps=5", "optimizer.min_ratio=0.1")
    expected = [RATE / 2, RATE, *(cosine(n / 3, 0.1) for n in (1, 2, 3))]
    assert rates(warm) == pytest.approx(expected)
    assert rates(run())[0] == pytest.approx(cosine(1 / STEPS, 0.9))


def test_optimizer_start_at_zero(run):
    options = ("optimizer.warmup_steps=2", "optimizer.steps=5", "optimizer.min_ratio=0.1")
    earlier = run(*options, "optimizer.start_at_zero=true")
    expected = [0, RATE / 2, RATE, cosine(1 / 3, 0.1), cosine(2 / 3, 0.1)]
    assert rates(earlier) == pytest.approx(expected)
    step = earlier.steps[0]
    assert all(torch.equal(step.before[name], step.after[name]) for name in step.before)


def test_optimizer_min_ratio(run):
    assert rates(run("optimizer.min_ratio=0"))[-1] == pytest.approx(0, abs=1e-12)
    assert rates(run("optimizer.min_ratio=0.25"))[-1] == pytest.approx(RATE / 4)
    assert rates(run())[-1] == pytest.approx(0.9 * RATE)


def test_optimizer_betas(run):
    other = run("optimizer.betas=[0.5, 0.6]")
    assert_updated(other, betas=(0.5, 0.6))
    with pytest.raises(AssertionError):
        assert_updated(other)


def test_optimizer_eps(run):
    """With an eps far above the gradients the update is the gradient's, and no sign."""
    damped = run("optimizer.eps=1.0")
    assert_updated(damped, eps=1.0)
    step = damped.steps[0]
    for name, gradient in step.gradients.items():
        moved = step.after[name] - step.before[name]
        # The means are corrected for their start; eps is added after that.
        expected = -rates(damped)[0] * gradient / (gradient.abs() + 1.0)
        torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-7)


def test_optimizer_weight_decay(run):
    """Weights of some size, so that what decays can be seen."""
    options = ("trainable.mode=weights",)
    decayed = run(*options, "optimizer.weight_decay=0.5")
    assert_updated(decayed, weight_decay=0.5)
    kept, step = run(*options).steps[0], decayed.steps[0]
    for name, value in step.before.items():
        expected = kept.after[name] - rates(decayed)[0] * 0.5 * value
        torch.testing.assert_close(step.after[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_optimizer_clip(run, clip):
    """With a large eps the size of the gradient is seen in the update."""
    clipped = run(f"optimizer.clip={clip}", "optimizer.eps=1.0", "optimizer.steps=1")
    step = clipped.steps[0]
    norm = math.sqrt(sum(float((g**2).sum()) for g in step.gradients.values()))
    assert norm > 1e-2
    scale = clip / norm if clip else 1.0
    rate = clipped.metrics[0]["learning_rate"]
    for name, gradient in step.gradients.items():
        scaled = gradient * scale
        expected = -rate * scaled / (scaled.abs() + 1.0)
        moved = step.after[name] - step.before[name]
        torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-8)


def test_optimizer_global_batch(run):
    larger = run("optimizer.global_batch=6")
    rows = [sum(len(b.tokens_bs) for b in step.batches["main"]) for step in larger.steps]
    assert rows == [6] * STEPS
    assert larger.metrics[-1]["tokens"] == 6 * CONTEXT * STEPS


def test_optimizer_micro_batch(run):
    """The same rows in fewer passes: the loss is the same mean."""
    one = run("optimizer.global_batch=4")
    four = run("optimizer.global_batch=4", "optimizer.micro_batch=4")
    assert [len(batch.tokens_bs) for batch in one.batches()] == [1] * 4 * STEPS
    assert [len(batch.tokens_bs) for batch in four.batches()] == [4] * STEPS
    assert four.losses[0] == pytest.approx(one.losses[0], rel=1e-5)
