"""What rounding takes away from trained weights, against values that are rounded by hand."""

from __future__ import annotations

import torch

from megalard.checkpoint import rounding
from megalard.checkpoint.rounding import RoundingLoss


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


def test_nothing_changed_is_nothing_lost():
    assert RoundingLoss().share == 0
