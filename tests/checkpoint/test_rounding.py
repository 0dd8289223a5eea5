"""What rounding takes away from trained weights, against values that are rounded by hand."""

from __future__ import annotations

import pytest
import torch

from megalard.checkpoint import rounding
from megalard.checkpoint.rounding import RoundingLoss, rounded


def test_changes_below_half_a_step_are_lost(monkeypatch):
    monkeypatch.setattr(rounding, "_BLOCK_ELEMENTS", 3)
    # bfloat16 has 8 significant bits: the next value after 1 is 1 + 2**-7, and after -4 -4 - 2**-5.
    before = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-4.0, -4.0, 0.0, 0.0]], dtype=torch.bfloat16)
    change = torch.tensor([[0.0, 2**-9, 2**-8 * 1.01, 2**-6], [-(2**-7), -(2**-5), 2**-40, 0.0]])
    exact = before.float() + change
    loss = RoundingLoss()
    loss.add(before, exact, exact.to(torch.bfloat16))
    assert (loss.changed, loss.lost) == (6, 2)
    assert loss.share == 2 / 6
    loss.add(before, exact, exact)  # fp32 keeps them all
    assert (loss.changed, loss.lost) == (12, 2)


def test_a_row_longer_than_a_block_is_rounded_too(monkeypatch):
    exact = torch.full((2, 1000), 1 + 2**-10)
    expected = rounded(exact, torch.bfloat16, "a", 0, True)
    monkeypatch.setattr(rounding, "_BLOCK_ELEMENTS", 3)
    assert torch.equal(rounded(exact, torch.bfloat16, "a", 0, True), expected)
    assert 0 < (expected != 1).float().mean() < 0.25, "an eighth of the values is rounded up"


def test_nothing_changed_is_nothing_lost():
    assert RoundingLoss().share == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_takes_a_neighbor_and_keeps_the_mean(dtype):
    """Against all values that the dtype has: the two around the exact value, and its distances."""
    all_values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    all_values = all_values[all_values.isfinite()].unique()
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(1000, generator=generator) * 10.0 ** torch.arange(-6, 4).repeat(100)
    above = torch.searchsorted(all_values, exact)
    low, high = all_values[above - 1], all_values[above]
    many = rounded(exact.expand(900, 1000).contiguous(), dtype, "w", 0, True).float()
    is_high = many == high
    assert bool((is_high | (many == low)).all())
    # The share of 900 draws deviates by at most 0.5 / 30 in one standard deviation.
    expected = (exact - low) / (high - low)
    assert float((is_high.float().mean(0) - expected).abs().max()) < 5 / 60
    assert float((is_high.float().mean(0) - expected).mean().abs()) < 5 / 60 / 1000**0.5


def test_values_of_the_dtype_and_what_is_not_finite_are_not_changed():
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.randn(64, 32).to(dtype)
        values[0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
        result = rounded(values.float(), dtype, "w", 0, True)
        assert torch.equal(result.view(torch.int16), values.view(torch.int16))
        assert rounded(torch.full((2, 2), float("nan")), dtype, "w", 0, True).isnan().all()
    assert rounded(torch.tensor([1e6]), torch.float16, "w", 0, True).isinf().all()
    assert torch.equal(rounded(torch.ones(3) / 3, torch.float32, "w", 0, True), torch.ones(3) / 3)
    assert rounded(torch.empty(0, 5), torch.bfloat16, "w", 0, True).shape == (0, 5)


def test_values_around_zero_may_become_the_smallest_of_either_sign():
    smallest = torch.finfo(torch.float16).smallest_normal * 2.0**-10
    exact = torch.tensor([0.25, -0.25]).repeat_interleave(4000)[None] * smallest
    result = rounded(exact, torch.float16, "w", 0, True).float()[0] / smallest
    assert set(result[:4000].tolist()) == {0.0, 1.0} and set(result[4000:].tolist()) == {0.0, -1.0}
    assert abs(float(result[:4000].mean()) - 0.25) < 0.03


def test_the_choice_depends_on_name_and_place_alone(monkeypatch):
    exact = torch.randn(50, 40)
    whole = rounded(exact, torch.bfloat16, "w", 0, True)
    parts = [rounded(exact[a : a + 7], torch.bfloat16, "w", a, True) for a in range(0, 50, 7)]
    assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(rounding, "_BLOCK_ELEMENTS", 90)
    assert torch.equal(rounded(exact, torch.bfloat16, "w", 0, True), whole)
    assert not torch.equal(rounded(exact, torch.bfloat16, "v", 0, True), whole)
    assert not torch.equal(rounded(exact, torch.bfloat16, "w", 1, True), whole)
    assert torch.equal(rounded(exact, torch.bfloat16, "w"), exact.bfloat16())
