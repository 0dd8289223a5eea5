"""Where the parameters of a decoder come from while it computes: the one question that it asks."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class WeightSource(Protocol):
    """What completes the parameters of a decoder before they are used.

    Parameters may be on their way from other ranks or from host memory when the forward pass
    begins. ``megalard.model.decoder.Decoder`` asks all its sources, in their order, before it gives
    a layer, the embedding, the final norm or the head to a computation.
    """

    def before_use(self, module: nn.Module) -> None:
        """Complete the parameters of a module, in the stream of the computation.

        This may be a collective call: all ranks use the same modules in the same order.
        """
        ...
