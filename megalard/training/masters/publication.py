"""Updated masters on their way to the decoder's parameters, while the next forward pass begins.

Buckets arrive in the order in which the forward pass reads them. Two are on the way, and the copy
of one into the parameters starts the next. All ranks run the same modules in the same order, and
therefore start the same gathers in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from megalard.parallel.collectives import PendingCollective
from megalard.training.masters.bucket import Bucket

_IN_FLIGHT = 2


class Publication:
    """The buckets whose weights the decoder does not have yet.

    It is a ``megalard.model.weight_source.WeightSource``.

    Args:
        buckets: the buckets, in the order in which the backward pass fills them.
    """

    def __init__(self, buckets: Sequence[Bucket]):
        self._buckets = list(reversed(buckets))
        self._places = {
            parameter: place
            for place, bucket in enumerate(self._buckets)
            for parameter in bucket.parameters
        }
        self._last_places: dict[nn.Module, int] = {}
        self._arriving: deque[_Arriving] = deque()
        self._num_started = self._num_complete = len(self._buckets)
        # Masters in host memory are copied in a stream of their own, next to the computation.
        masters = [bucket.master for bucket in buckets]
        on_host = any(master.device.type == "cpu" and master.is_pinned() for master in masters)
        self._stream = torch.cuda.Stream(buckets[0].device) if on_host else None

    def start(self) -> None:
        """Begin to give the decoder the values of the masters; a collective call."""
        self.complete()
        for bucket in self._buckets:
            bucket.write_divided()
        self._num_started = self._num_complete = 0
        self._start_more()

    def before_use(self, module: nn.Module) -> None:
        """Complete the parameters of a module; a collective call."""
        if self._num_complete == len(self._buckets):
            return
        if module not in self._last_places:
            places = (self._places.get(parameter, -1) for parameter in module.parameters())
            self._last_places[module] = max(places, default=-1)
        self._complete(self._last_places[module] + 1)

    def after_layer(self, layer: nn.Module, outputs: Iterable[torch.Tensor]) -> None:
        """Do nothing: the parameters of a layer that was used stay complete."""

    def complete(self) -> None:
        """Complete all parameters; a collective call."""
        self._complete(len(self._buckets))

    def _complete(self, count: int) -> None:
        while self._num_complete < count:
            self._arriving.popleft().finish()
            self._num_complete += 1
            self._start_more()

    def _start_more(self) -> None:
        last = min(len(self._buckets), self._num_complete + _IN_FLIGHT)
        for bucket in self._buckets[self._num_started : last]:
            self._arriving.append(_Arriving(bucket, self._stream))
        self._num_started = max(self._num_started, last)


class _Arriving:
    """The masters of one bucket, rounded, on their way.

    Args:
        bucket: the bucket.
        stream: the stream in which masters are copied from host memory; None if they are not.
    """

    def __init__(self, bucket: Bucket, stream: torch.cuda.Stream | None):
        self._bucket, self._arrived = bucket, None
        self._gathered: PendingCollective | torch.Tensor
        if stream is not None:
            # What this stream allocates was freed after all work that has been launched so far.
            stream.wait_stream(torch.cuda.current_stream(bucket.device))
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            self._gathered = bucket.start_gather()
            self._arrived = None if stream is None else stream.record_event()

    def finish(self) -> None:
        """Write the weights into the parameters, in the stream of the computation."""
        if self._arrived is not None:
            self._arrived.wait(torch.cuda.current_stream(self._bucket.device))
        self._bucket.finish_gather(self._gathered)
