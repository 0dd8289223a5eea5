"""Masters that the decoder computes with directly: fp32 parameters, full on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Axis


class PlainMasters:
    """fp32 gradients of some trained parameters; each ``.grad`` is a view of one flat tensor.

    Attributes:
        parameters: the parameters, which are those of the optimizer as well.
        gradient: fp32, one flat tensor.

    Args:
        trained: fp32 parameters by their number of replicas.
        holders: the ranks that hold the same slice of a parameter with that many replicas.
        device: the device of the parameters.
    """

    def __init__(
        self,
        trained: Mapping[int, Sequence[nn.Parameter]],
        holders: Mapping[int, Axis],
        device: torch.device,
    ):
        self.parameters = [parameter for group in trained.values() for parameter in group]
        total = sum(parameter.numel() for parameter in self.parameters)
        self.gradient = torch.zeros(total, device=device)
        self._sections: list[tuple[torch.Tensor, int, Axis]] = []
        offset = 0
        for replicas, group in trained.items():
            start = offset
            for parameter in group:
                view = self.gradient[offset : offset + parameter.numel()]
                parameter.grad = view.view_as(parameter)
                offset += parameter.numel()
            self._sections.append((self.gradient[start:offset], replicas, holders[replicas]))

    def reduce(self) -> None:
        """Sum every gradient over the ranks that computed a part of it; a collective call."""
        for section, _, axis in self._sections:
            all_reduce(section, axis)

    def square(self) -> torch.Tensor:
        """Return the square of the norm, whose sum over the tp ranks counts a parameter once."""
        square = self.gradient.new_zeros(())
        for section, replicas, _ in self._sections:
            square += torch.linalg.vector_norm(section) ** 2 / replicas
        return square
