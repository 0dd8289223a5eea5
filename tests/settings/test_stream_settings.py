"""streams and stages: each entry has the effect of the setting of the same name in its part."""

from __future__ import annotations

import pytest
import torch

from megalard.training.step import StepResult
from tests.settings.tiny_run import CONTEXT, TinyRun, changed, projections

KL = "{objective: {logits_kl: 1}}"
LM = "objective: {language_modelling: 1}"


def two(extra: str = "") -> str:
    """Return two streams, of which the second has some more entries."""
    return f"streams={{short: {KL}, long: {{{LM}{extra}}}}}"


# Every stage gives its own number of steps.
NO_STEPS = "-optimizer.steps"


def first(run: TinyRun) -> StepResult:
    return run.steps[0].result


def test_streams_objective(run):
    both = run(two())
    assert set(first(both).parts) == {"short.logits", "long.lm"}
    assert first(both).loss == pytest.approx(sum(first(both).parts.values()), rel=1e-5)


def test_streams_data(run, job):
    other = f", data: {{paths: {job / 'heldout.txt'}, context_length: 64}}"
    both = run(two(other))
    assert {b.tokens_bs.shape[1] for b in both.batches("short")} == {CONTEXT}
    assert {b.tokens_bs.shape[1] for b in both.batches("long")} == {64}
    assert both.folders("tokens-short") and both.folders("tokens-long")


def test_streams_weight(run):
    both = run(two(", weight: 0.25"))
    parts = first(both).parts
    assert parts == pytest.approx(first(run(two())).parts, rel=1e-5)
    assert first(both).loss == pytest.approx(parts["short.logits"] + 0.25 * parts["long.lm"], 1e-5)


def test_the_weight_of_a_stream_is_that_of_its_gradient(run):
    """The gradient is linear in the weight: short + weight x long."""
    quarter, one, three = (
        run(two(extra)).steps[0].gradients for extra in (", weight: 0.25", "", ", weight: 3")
    )
    for name in one:
        if name.endswith("lora_B"):
            long = (three[name] - one[name]) / 2
            assert long.norm() > 0.01 * one[name].norm()
            again = (one[name] - quarter[name]) / 0.75
            torch.testing.assert_close(again, long, rtol=1e-2, atol=1e-6)


def test_streams_global_batch(run):
    both = run(two(", global_batch: 4"))
    rows = [len(both.steps[0].batches[name]) for name in ("short", "long")]
    assert rows == [2, 4]
    assert both.metrics[0]["tokens"] == 6 * CONTEXT


def test_streams_micro_batch(run):
    both = run(two(", global_batch: 4, micro_batch: 2"))
    assert [len(b.tokens_bs) for b in both.steps[0].batches["long"]] == [2, 2]
    assert [len(b.tokens_bs) for b in both.steps[0].batches["short"]] == [1, 1]


def stages(extra: str = "", begin: str = "") -> str:
    """Return two stages of two steps, of which the second has some more entries."""
    steps = "optimizer: {steps: 2}"
    return f"stages={{one: {{{steps}{begin}}}, two: {{{steps}{extra}}}}}"


def test_stages_trainable(run):
    """The first stage trains LoRA pairs, and the second weights."""
    both = run(stages(", trainable: {mode: weights, weights: [v]}"), NO_STEPS)
    assert all(name.endswith(("lora_A", "lora_B")) for name in both.steps[1].after)
    assert set(both.steps[2].after) == projections("v")


def test_stages_objective(run):
    both = run(stages(", objective: {logits_kl: 1}"), NO_STEPS)
    names = [set(step.result.parts) for step in both.steps]
    assert names == [{"q", "k", "v"}] * 2 + [{"logits"}] * 2


def test_stages_data(run):
    both = run(stages(", data: {context_length: 16}"), NO_STEPS)
    lengths = [batch.tokens_bs.shape[1] for batch in both.batches()]
    assert lengths == [CONTEXT] * 4 + [16] * 4


def test_stages_streams(run):
    both = run(stages(f", streams: {{a: {KL}, b: {{{LM}}}}}"), NO_STEPS)
    assert [set(step.batches) for step in both.steps] == [{"main"}] * 2 + [{"a", "b"}] * 2


def test_stages_optimizer(run):
    slow = "{steps: 3, learning_rate: 1e-4, warmup_steps: 3}"
    each = f"stages={{one: {{optimizer: {{steps: 2}}}}, two: {{optimizer: {slow}}}}}"
    both = run(each, NO_STEPS)
    rates = [line["learning_rate"] for line in both.metrics]
    assert rates[2:] == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4])
    assert [line["stage"] for line in both.metrics] == ["one"] * 2 + ["two"] * 3


def test_stages_keep_optimizer(run):
    """With the state kept the third update goes on with the moments; else it begins anew.

    A first update of AdamW moves every value by the rate, up to eps.
    """
    options = ("trainable.mode=weights", "optimizer.eps=1e-12", "optimizer.betas=[0.9, 0.9]")
    anew = run(stages(), NO_STEPS, *options)
    kept = run(stages(", keep_optimizer: true"), NO_STEPS, *options)
    for name in projections("q", "k", "v"):
        moved = [(r.steps[2].after[name] - r.steps[2].before[name]).abs() for r in (anew, kept)]
        rate = anew.metrics[2]["learning_rate"]
        torch.testing.assert_close(moved[0], torch.full_like(moved[0], rate), rtol=1e-2, atol=1e-5)
        assert (moved[1] / rate - 1).abs().median() > 0.05


def test_stages_export(run, job):
    second = ", trainable: {lora: {targets: [v]}}"
    both = run(stages(begin=", export: true", extra=second), NO_STEPS)
    assert (both.output / "stage-one").is_dir() and not (both.output / "stage-two").exists()
    assert not (run(stages(), NO_STEPS).output / "stage-one").exists()
    # The last student has what both stages changed.
    assert changed(both, job / "teacher") == projections("q", "k", "v")
