"""Masters and gradients that are divided over ranks (ZeRO stages 1 and 2, arXiv 1910.02054).

The gradients of a bucket are reduce-scattered as soon as the backward pass has computed them, while
it goes on. A rank then updates its parts of the masters, and an all-gather returns the weights
while the next forward pass begins (``megalard.training.masters.publication``). The loss of a
micro-batch has to reach the same parameters on all ranks, so that they send the same buckets.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from megalard.parallel.mesh import Axis
from megalard.training.masters.bucket import Bucket
from megalard.training.masters.publication import Publication

# Elements of a bucket. A bucket of 2^25 fp32 gradients is 128 MiB, which an exchange over NVLink
# carries at full speed.
BUCKET_ELEMENTS = 2**25
# Buckets whose gradients are on the way at the same time.
_IN_FLIGHT = 2


class ShardedMasters:
    """The buckets of a run, in the order in which the backward pass fills them.

    Attributes:
        buckets: the buckets.
        publication: the way of updated weights to the decoder.

    Args:
        trained: each parameter with the ranks that hold it, in the order of the forward pass.
        dtype: the dtype that the parameters get.
        gradient_dtype: dtype in which gradients are summed.
        is_offloaded: whether the masters are in host memory.
    """

    def __init__(
        self,
        trained: Sequence[tuple[nn.Parameter, Axis]],
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
        is_offloaded: bool,
    ):
        self.buckets = [
            Bucket(parameters, axis, dtype, gradient_dtype, is_offloaded)
            for parameters, axis in _fill_buckets(trained)
        ]
        self.publication = Publication(self.buckets)
        # A parameter refers to its hook, which therefore must not keep the buckets alive.
        on_gradient = weakref.WeakMethod(self._on_gradient)
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(_call, on_gradient, number))
        self._missing = [len(bucket.parameters) for bucket in self.buckets]
        self._next = 0
        self._sent: deque[Bucket] = deque()
        self._local_sums: list[torch.Tensor] = []

    def end_backward(self) -> None:
        """Send what the backward pass of a micro-batch has left; a collective call.

        A bucket is left if the loss of the micro-batch does not depend on all its parameters.
        """
        while self._next < len(self.buckets):
            self._send()
        self._next = 0
        self._missing = [len(bucket.parameters) for bucket in self.buckets]

    def reduce(self) -> torch.Tensor:
        """Wait until all gradients are summed.

        Returns:
            A scalar that is finite if all gradients were finite that this rank computed.
        """
        while self._sent:
            self._sent.popleft().finish_reduction()
        total = torch.stack(self._local_sums).sum()
        self._local_sums.clear()
        return total

    def square(self) -> torch.Tensor:
        """Return the square of the norm, to be summed over all ranks."""
        norms = [torch.linalg.vector_norm(b.gradient, dtype=torch.float32) for b in self.buckets]
        return torch.stack(norms).square().sum()

    def _on_gradient(self, number: int) -> None:
        """Send all complete buckets. Every rank sends them in the same order."""
        self._missing[number] -= 1
        while self._next < len(self.buckets) and self._missing[self._next] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[self._next]
        self._next += 1
        while len(self._sent) >= _IN_FLIGHT or bucket in self._sent:
            self._sent.popleft().finish_reduction()
        self._local_sums.append(bucket.start_reduction())
        self._sent.append(bucket)


def _call(on_gradient: weakref.WeakMethod, number: int, parameter: torch.Tensor) -> None:
    method = on_gradient()
    if method is not None:
        method(number)


def _fill_buckets(
    trained: Sequence[tuple[nn.Parameter, Axis]],
) -> list[tuple[list[nn.Parameter], Axis]]:
    """Cut the reversed list of parameters into buckets of about the same size.

    Each bucket has parameters of one axis. It stands where its last parameter stands.
    """
    by_axis: dict[int, tuple[list[nn.Parameter], Axis]] = {}
    filled: list[tuple[list[nn.Parameter], Axis]] = []
    for parameter, axis in reversed(trained):
        parameters, _ = by_axis.setdefault(axis.size, ([], axis))
        parameters.append(parameter)
        if sum(p.numel() for p in parameters) >= BUCKET_ELEMENTS:
            filled.append(by_axis.pop(axis.size))
    return [*filled, *by_axis.values()]
