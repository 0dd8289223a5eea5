"""Point-to-point exchange of tensors between two ranks of an axis, overlapped with computation."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalard.parallel.mesh import Axis


class Exchange:
    """Tensors on their way to one rank, and others on their way from another rank.

    Starting returns at once, so that computation overlaps the transfer. Every rank of the axis
    starts the same exchanges in the same order.

    Attributes:
        sent_bytes: the bytes that this rank sends.

    Args:
        tensors: contiguous tensors to send. The received tensors have the same shapes and dtypes.
        recipient, source: ranks along the axis.
    """

    def __init__(self, tensors: list[torch.Tensor], recipient: int, source: int, axis: Axis):
        self._received = [torch.empty_like(x) for x in tensors]
        self.sent_bytes = sum(x.numel() * x.element_size() for x in tensors)
        self._sent = tensors  # kept alive until the transfer is complete
        sends = [dist.P2POp(dist.isend, x, group=axis.group, group_peer=recipient) for x in tensors]
        receives = [
            dist.P2POp(dist.irecv, x, group=axis.group, group_peer=source) for x in self._received
        ]
        self._requests = dist.batch_isend_irecv(sends + receives)

    def wait(self) -> list[torch.Tensor]:
        """Wait for the transfer and return the received tensors."""
        for request in self._requests:
            request.wait()
        return self._received
