"""LoRA's dropout and initial values against their definitions, and A against peft."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from megalard.model.lora import Dropout, DropoutKey, initial_a

ROWS, FEATURES = 400, 50
TOKENS = torch.arange(ROWS)


def mask(rate: float, place: int = 0, seed: int = 1, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Return which entries of a matrix of ones remain."""
    key = DropoutKey()
    key.seed = seed
    ones = torch.ones(len(tokens), FEATURES)
    return Dropout(rate, place, key)(ones, tokens, first_row=0, first_feature=0) != 0


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_entries_are_dropped_at_the_rate_and_the_others_scaled(rate):
    x = torch.randn(ROWS, FEATURES)
    out = Dropout(rate, 3, DropoutKey())(x, TOKENS, first_row=0, first_feature=0)
    is_kept = out != 0
    torch.testing.assert_close(out[is_kept], x[is_kept] / (1 - rate))
    # Four standard deviations of a binomial share of 20,000 entries.
    allowed = 4 * math.sqrt(rate * (1 - rate) / x.numel())
    assert abs(1 - float(is_kept.double().mean()) - rate) < allowed


def test_the_gradient_has_the_mask_and_the_scale_of_the_value():
    x = torch.ones(ROWS, FEATURES, requires_grad=True)
    out = Dropout(0.3, 0, DropoutKey())(x, TOKENS, first_row=0, first_feature=0)
    (out * 2).sum().backward()
    assert torch.equal(x.grad, 2 * out.detach())


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the share of entries that two masks have in common."""
    return float((a == b).double().mean())


def test_masks_differ_between_steps_between_places_and_between_tokens():
    """Independent masks of rate 1/2 agree on half of the entries.

    Places and tokens are not added up: the next place does not have the mask of the next token.
    """
    reference = mask(0.5)
    others = (
        mask(0.5, seed=2),
        mask(0.5, place=1),
        mask(0.5, tokens=TOKENS + ROWS),
        mask(0.5, place=1, tokens=TOKENS - 1),
    )
    for other in others:
        assert agreement(reference, other) == pytest.approx(0.5, abs=4 * 0.5 / 20_000**0.5)
    assert torch.equal(reference, mask(0.5))
    # Neither rows nor columns repeat.
    assert len(reference.unique(dim=0)) == ROWS and len(reference.unique(dim=1)[0]) == FEATURES


def test_a_rectangle_has_the_mask_of_the_whole_input():
    """So the layout of ranks does not matter."""
    dropout, x = Dropout(0.5, 2, DropoutKey()), torch.randn(ROWS, FEATURES)
    full = dropout(x, TOKENS, first_row=0, first_feature=0)
    part = dropout(x[100:300, 20:45], TOKENS, first_row=100, first_feature=20)
    assert torch.equal(part, full[100:300, 20:45])


@pytest.mark.parametrize(("rate", "tokens"), [(0.0, TOKENS), (0.5, None)])
def test_without_a_rate_or_tokens_nothing_is_dropped(rate, tokens):
    x = torch.randn(ROWS, FEATURES)
    assert Dropout(rate, 0, DropoutKey())(x, tokens, first_row=0, first_feature=0) is x


class Model(nn.Module):
    """A model that peft can adapt."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(256, 64)


def test_a_starts_as_in_peft():
    """Uniform with the same bounds; B starts at zero there as well."""
    torch.manual_seed(0)
    adapted = get_peft_model(Model(), LoraConfig(r=512, target_modules=["q_proj"]))
    theirs = adapted.base_model.model.q_proj.lora_A["default"].weight.detach()
    ours = initial_a(512, 256, seed=0)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
    bound = 1 / math.sqrt(256)
    for a in (ours, theirs):
        # Of 131,072 uniform values the largest is within 1e-4 of the bound.
        assert float(a.abs().max()) == pytest.approx(bound, rel=1e-3)
        assert float(a.abs().max()) <= bound
        # The standard deviation of a uniform distribution. The mean has one of 0.0016 bounds.
        assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=1e-2)
        assert abs(float(a.mean())) < 0.01 * bound


def test_a_depends_on_its_seed_alone():
    torch.manual_seed(5)
    first = initial_a(4, 8, seed=1)
    torch.manual_seed(6)
    assert torch.equal(first, initial_a(4, 8, seed=1))
    assert not torch.equal(first, initial_a(4, 8, seed=2))
