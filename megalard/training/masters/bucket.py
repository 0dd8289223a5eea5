"""Trained parameters whose fp32 masters are divided over the ranks that hold them.

A bucket is the unit of communication. Each of its parameters [n, ...] is cut along dim 0 into as
many equal parts as there are ranks; the last parts may be shorter or empty, as with torch.chunk.
A rank holds its part of every parameter, one after another, in one flat tensor:

    two ranks, parameters a [4, 2] and b [3]

    rank 0   a0 a0 a1 a1 b0 b1
    rank 1   a2 a2 a3 a3 b2 --         -- is padding, which is always zero

The rows of this picture are a *packed* tensor [ranks, elements]. It is what a reduce-scatter of the
gradients takes and what an all-gather of the weights returns. A parameter that is itself divided
(``megalard.parallel.divided_weights``) is cut in the same way, and takes its rows from this rank's
master.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from megalard.parallel.collectives import (
    PendingCollective,
    all_gather_tokens,
    start_all_gather_tokens,
    start_reduce_scatter_tokens,
)
from megalard.parallel.divided_weights import DividedParameter
from megalard.parallel.mesh import Axis


@dataclass(frozen=True)
class Part:
    """Where the parts of one parameter are in a packed tensor.

    Attributes:
        shape: the shape of the parameter.
        start, length: the elements of each row of the packed tensor that belong to it.
    """

    shape: tuple[int, ...]
    start: int
    length: int

    @property
    def row_elements(self) -> int:
        """The number of elements of one row of the parameter."""
        return math.prod(self.shape[1:])

    def has_padding(self, ranks: int) -> bool:
        """Whether some rank's part is shorter than the others."""
        return math.prod(self.shape) < ranks * self.length

    def shape_on(self, rank: int) -> tuple[int, ...]:
        """Return the shape of a rank's part, without padding."""
        rows = self.length // self.row_elements
        return (max(0, min(rows, self.shape[0] - rank * rows)), *self.shape[1:])

    def pairs(
        self, packed: torch.Tensor, parameter: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return views of the same elements in a packed tensor and in the parameter."""
        if self.length == 0:
            return []
        columns = packed[:, self.start : self.start + self.length]
        flat = parameter.reshape(-1)
        whole, rest = divmod(flat.numel(), self.length)
        pairs = [(columns[:whole], flat[: whole * self.length].view(whole, self.length))]
        if rest:
            pairs.append((columns[whole, :rest], flat[whole * self.length :]))
        return pairs


class Bucket:
    """The masters and the gradients of some parameters, this rank's parts of them.

    The parameters themselves get the compute dtype. They are full on every rank of the axis, or
    divided over it.

    Attributes:
        parameters: the parameters.
        parts: where each parameter is in the flat tensors.
        device: the device of the parameters.
        master: fp32 [elements], the parameter of the optimizer.
        gradient: [elements], the sum over all ranks of the axis and over micro-batches.

    Args:
        parameters: fp32 parameters with the values of the masters.
        axis: the ranks that hold the same parameters.
        dtype: the dtype that the parameters get.
        gradient_dtype: dtype in which gradients are summed.
        is_offloaded: whether the master is in host memory.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        axis: Axis,
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
        is_offloaded: bool,
    ):
        self.parameters, self.axis = list(parameters), axis
        self.parts: list[Part] = []
        start = 0
        for parameter in parameters:
            rows = -(-parameter.shape[0] // axis.size)
            length = rows * math.prod(parameter.shape[1:])
            self.parts.append(Part(tuple(parameter.shape), start, length))
            start += length
        self.device = parameters[0].device
        flat = torch.zeros(start, device=self.device)
        for part, parameter in zip(self.parts, parameters, strict=True):
            rows = part.length // part.row_elements
            if isinstance(parameter, DividedParameter):
                values, parameter.rows = parameter.rows, parameter.rows.to(dtype)
            else:
                values = parameter.detach()[axis.rank * rows : (axis.rank + 1) * rows]
                parameter.data = parameter.detach().to(dtype)
            flat[part.start : part.start + values.numel()] = values.reshape(-1)
        self._gathered = [
            (part, parameter)
            for part, parameter in zip(self.parts, parameters, strict=True)
            if not isinstance(parameter, DividedParameter)
        ]
        self.master = nn.Parameter(self._in_host_memory(flat) if is_offloaded else flat)
        self._host_gradient = self._in_host_memory(flat) if is_offloaded else None
        self.gradient = torch.zeros(start, dtype=gradient_dtype, device=self.device)
        self._sent: PendingCollective | None = None

    def view(self, flat: torch.Tensor, number: int) -> torch.Tensor:
        """Return this rank's part of a parameter in a flat tensor such as ``master``, as a view."""
        part = self.parts[number]
        shape = part.shape_on(self.axis.rank)
        return flat[part.start : part.start + math.prod(shape)].view(shape)

    def start_reduction(self) -> torch.Tensor:
        """Take the gradients of the parameters and start to sum them over the ranks.

        A parameter without a gradient contributes zero.

        Returns:
            The sum of this rank's gradients, an fp32 scalar, which is finite if all of them are.
        """
        packed = self.gradient.new_empty(self.axis.size, self.gradient.numel())
        for part, parameter in zip(self.parts, self.parameters, strict=True):
            if parameter.grad is None or part.has_padding(self.axis.size):
                packed[:, part.start : part.start + part.length] = 0
            if parameter.grad is not None:
                for target, source in part.pairs(packed, parameter.grad):
                    target.copy_(source)
                parameter.grad = None
        total = packed.sum(dtype=torch.float32)
        if self.axis.size == 1:
            self.gradient += packed[0]
        else:
            self._sent = start_reduce_scatter_tokens(packed.view(-1), self.axis)
        return total

    def finish_reduction(self) -> None:
        """Add the sums to the gradient."""
        if self._sent is not None:
            self.gradient += self._sent.wait()
            self._sent = None

    def give_gradient(self) -> None:
        """Give the gradient to the master, in fp32 and on its device."""
        if self._host_gradient is None:
            self.master.grad = self.gradient.float()
        else:
            self.master.grad = self._host_gradient.copy_(self.gradient)

    def take_back_gradient(self) -> None:
        """Free the fp32 copy that ``give_gradient`` made on the GPU, if it made one."""
        if self._host_gradient is None:
            self.master.grad = None

    def write_divided(self) -> None:
        """Give the parameters that are divided the rows of this rank's master."""
        for part, parameter in zip(self.parts, self.parameters, strict=True):
            if isinstance(parameter, DividedParameter):
                parameter.write(self._local(part))

    def start_gather(self) -> PendingCollective | torch.Tensor:
        """Start to gather the masters of all other parameters, rounded to the compute dtype.

        Returns:
            The gather, or the rounded masters if no other rank has a part of them.
        """
        pieces = [self.master.detach()]
        if len(self._gathered) < len(self.parts):
            pieces = [self._local(part) for part, _ in self._gathered]
        if not pieces:
            return self.gradient.new_empty(0)
        on_device = [piece.to(self.device, non_blocking=True) for piece in pieces]
        master = on_device[0] if len(on_device) == 1 else torch.cat(on_device)
        rounded = master.to(self.parameters[0].dtype)
        return rounded if self.axis.size == 1 else start_all_gather_tokens(rounded, self.axis)

    def finish_gather(self, gathered: PendingCollective | torch.Tensor) -> None:
        """Write what ``start_gather`` returned into the parameters."""
        packed = gathered if isinstance(gathered, torch.Tensor) else gathered.wait()
        packed, start = packed.view(self.axis.size, -1), 0
        for part, parameter in self._gathered:
            moved = replace(part, start=start)
            for source, target in moved.pairs(packed, parameter.detach()):
                target.copy_(source)
            start += part.length

    def full(self, flat: torch.Tensor, number: int) -> torch.Tensor:
        """Return a parameter's part of a flat tensor as it is over all ranks; a collective call.

        Args:
            flat: ``master`` or ``gradient``.
            number: the number of the parameter.
        """
        part = self.parts[number]
        local = flat.detach()[part.start : part.start + part.length].to(self.device)
        packed = all_gather_tokens(local, self.axis)
        return packed[: math.prod(part.shape)].view(part.shape)

    def _local(self, part: Part) -> torch.Tensor:
        """Return this rank's part of a parameter's master with its padding, as a view."""
        return self.master.detach()[part.start : part.start + part.length]

    def _in_host_memory(self, flat: torch.Tensor) -> torch.Tensor:
        """Return a copy in host memory, pinned if the parameters are on a GPU."""
        return torch.empty_like(flat, device="cpu", pin_memory=flat.is_cuda).copy_(flat)
