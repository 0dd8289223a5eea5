"""Which slice of a parameter a rank holds; ``megalard.parallel.tensor.slices`` decides it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ParameterSlice:
    """This rank's slice of a parameter.

    Attributes:
        full_shape: the shape of the full tensor.
        dim: the dimension that is split; None if every rank holds the full tensor.
        start, length: this rank's slice along ``dim``.
        replicas: the number of neighboring tp ranks that hold the same slice: 1, all, or some of
            them for K/V heads.
    """

    full_shape: tuple[int, ...]
    dim: int | None
    start: int
    length: int
    replicas: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the slice."""
        shape = list(self.full_shape)
        if self.dim is not None:
            shape[self.dim] = self.length
        return tuple(shape)

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of the full tensor, as a view."""
        return full if self.dim is None else full.narrow(self.dim, self.start, self.length)


def full_slice(full_shape: tuple[int, ...], tp: int = 1) -> ParameterSlice:
    """Return the slice of a tensor that each of ``tp`` ranks holds in full."""
    return ParameterSlice(full_shape, None, 0, 0, tp)
