"""The gradients of everything trained, in one flat buffer, and their sums over ranks.

A parameter held by several tp ranks gets only a part of its gradient on each of them: norm weights
and column-parallel LoRA A's see a share of the tokens, replicated K/V heads a share of the query
heads. Without the sums here training runs and is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Axis, Mesh
from megalard.parallel.tensor.layout import Layout


class GradientBuffer:
    """fp32 gradients of the trained parameters, each ``.grad`` a view of one flat tensor.

    Args:
        trained: name to fp32 parameter.
        layouts: name to layout.
        mesh: the axes to sum over.
        kv_axis: the ranks that hold the same K/V heads.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        layouts: Mapping[str, Layout],
        mesh: Mesh,
        kv_axis: Axis,
    ):
        self.mesh = mesh
        by_holders: dict[int, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            by_holders.setdefault(layouts[name].holders, []).append(parameter)
        total = sum(parameter.numel() for parameter in trained.values())
        self.flat = torch.zeros(total, dtype=torch.float32, device=mesh.device)
        axes = {1: Axis(None, 0, 1), kv_axis.size: kv_axis, mesh.tp.size: mesh.tp}
        self._spans: list[tuple[torch.Tensor, Axis]] = []
        offset = 0
        for holders, parameters in sorted(by_holders.items()):
            first = offset
            for parameter in parameters:
                view = self.flat[offset : offset + parameter.numel()]
                parameter.grad = view.view_as(parameter)
                offset += parameter.numel()
            self._spans.append((self.flat[first:offset], axes[holders]))

    def zero(self) -> None:
        self.flat.zero_()

    def reduce(self) -> None:
        """Sum every gradient over the ranks that computed a part of it."""
        for span, axis in self._spans:
            all_reduce(span, axis)
        all_reduce(self.flat, self.mesh.data)

    def norm(self) -> torch.Tensor:
        """The global L2 norm (fp32 scalar) of the reduced gradient, each parameter counted once."""
        square = self.flat.new_zeros(())
        for span, axis in self._spans:
            square += torch.linalg.vector_norm(span) ** 2 / axis.size
        return all_reduce(square, self.mesh.tp).sqrt()

    def clip(self, norm: torch.Tensor, largest: float) -> None:
        """Scale the gradient down to the norm ``largest`` where it is above and a number."""
        self.flat.mul_((largest / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0))
