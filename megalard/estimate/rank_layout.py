"""How many ranks each axis has, without process groups: the layout that an estimate is for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalard.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class RankLayout:
    """A layout of ranks: the sizes of the axes dp, cp and tp."""

    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def ranks(self) -> int:
        """The number of all ranks."""
        return self.dp * self.cp * self.tp

    @property
    def data(self) -> int:
        """The number of ranks over which gradients of the same weights are summed."""
        return self.dp * self.cp

    @property
    def tp_axis(self) -> Axis:
        """Rank 0 of the tp axis, which holds no fewer rows of the vocabulary than other ranks."""
        return Axis(None, 0, self.tp)

    @property
    def mesh(self) -> Mesh:
        """Rank 0 of a mesh without process groups, which can be checked but not communicate."""
        world, dp, cp, data, tp = (
            Axis(None, 0, size) for size in (self.ranks, self.dp, self.cp, self.data, self.tp)
        )
        return Mesh(world, dp, cp, data, tp, torch.device("cpu"))

    def __str__(self) -> str:
        return f"dp {self.dp} x cp {self.cp} x tp {self.tp}"
