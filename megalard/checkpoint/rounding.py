"""Count what rounding to the dtype of a file takes away from what was trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The number of elements that are copied to fp32 at a time.
_BLOCK_ELEMENTS = 2**22


@dataclass
class RoundingLoss:
    """How many elements training changed, and how many of them are unchanged in the file.

    Attributes:
        changed: elements that differ from the model that training started from.
        lost: changed elements that rounding makes equal to that model again, because they differ
            from it by less than half a step of the dtype.
    """

    changed: int = 0
    lost: int = 0

    def add(self, before: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count the elements of a tensor or a part of it.

        Args:
            before: the values that training started from.
            exact: the trained values, fp32.
            rounded: the trained values as they are stored.
        """
        flat = (tensor.reshape(-1).split(_BLOCK_ELEMENTS) for tensor in (before, exact, rounded))
        for old, new, stored in zip(*flat, strict=True):
            old = old.to(new)
            is_changed = new != old
            self.changed += int(is_changed.sum())
            self.lost += int((is_changed & (stored.to(new) == old)).sum())

    @property
    def share(self) -> float:
        """The share of the changed elements that is lost."""
        return self.lost / max(1, self.changed)
