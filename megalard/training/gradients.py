"""The gradients of everything that is trained, in one flat buffer, and their sums over ranks.

A parameter that several tp ranks hold gets only a part of its gradient on each of them: norm
weights and the A of column-parallel LoRA pairs see a share of the tokens, and replicated K/V heads
see a share of the query heads. Without the sums here training would run and give wrong results.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megalard.model.layout import Layout
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import SINGLE, Axis, Mesh


class GradientBuffer:
    """fp32 gradients of the trained parameters; each ``.grad`` is a view of one flat tensor.

    Parameters with the same number of replicas are neighbors in the buffer.

    Attributes:
        flat: the buffer, fp32.

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
        by_replicas: dict[int, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            by_replicas.setdefault(layouts[name].replicas, []).append(parameter)
        total = sum(parameter.numel() for parameter in trained.values())
        self.flat = torch.zeros(total, dtype=torch.float32, device=mesh.device)
        axes = {1: SINGLE, kv_axis.size: kv_axis, mesh.tp.size: mesh.tp}
        self._sections: list[tuple[torch.Tensor, Axis]] = []
        offset = 0
        for replicas, parameters in sorted(by_replicas.items()):
            start = offset
            for parameter in parameters:
                view = self.flat[offset : offset + parameter.numel()]
                parameter.grad = view.view_as(parameter)
                offset += parameter.numel()
            self._sections.append((self.flat[start:offset], axes[replicas]))

    def zero(self) -> None:
        """Set every gradient to zero."""
        self.flat.zero_()

    def reduce(self) -> None:
        """Sum every gradient over the ranks that computed a part of it; a collective call."""
        for section, axis in self._sections:
            all_reduce(section, axis)
        all_reduce(self.flat, self.mesh.data)

    def norm(self) -> torch.Tensor:
        """Return the global L2 norm of the reduced gradient, an fp32 scalar; a collective call.

        Each parameter counts once, however many ranks hold it.
        """
        square = self.flat.new_zeros(())
        for section, axis in self._sections:
            square += torch.linalg.vector_norm(section) ** 2 / axis.size
        return all_reduce(square, self.mesh.tp).sqrt()

    def clip(self, norm: torch.Tensor, largest: float) -> None:
        """Scale the gradient down to the norm ``largest`` if its norm is larger and finite."""
        self.flat.mul_((largest / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0))
