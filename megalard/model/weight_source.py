"""Where the parameters of a decoder come from while it computes: the one question that it asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn


class WeightSource(Protocol):
    """What completes the parameters of a decoder before they are used.

    Parameters may be on their way from other ranks or from host memory when the forward pass
    begins. ``megalard.model.decoder.Decoder`` asks all its sources, in their order, before it gives
    a layer, the embedding, the final norm or the head to a computation. Whatever runs a layer says
    afterwards what the layer returned.
    """

    def before_use(self, module: nn.Module) -> None:
        """Complete the parameters of a module, in the stream of the computation.

        This may be a collective call: all ranks use the same modules in the same order.
        """
        ...

    def after_layer(self, layer: nn.Module, outputs: Iterable[torch.Tensor]) -> None:
        """Note what a layer has returned, from whose gradients the backward pass continues."""
        ...
