"""A micro-batch's forward and backward pass as a few instants, the largest of which is the peak.

An *instant* is a place in the step with all tensors that live there. Which of them is the peak
depends on the shape, the objective, the layout and the settings, so all of them are computed.
"""

from __future__ import annotations

from megalard.config.schema import ParallelConfig
from megalard.estimate.backward import BackwardPass
from megalard.estimate.buckets import Buckets
from megalard.estimate.forward import ForwardPass
from megalard.estimate.saved import Instant
from megalard.estimate.sizes import Sizes
from megalard.estimate.trained import Trained

NamedInstant = tuple[str, Instant]
"""The name of an instant, and its bytes by kind of tensor."""


def passes(
    sizes: Sizes, trained: Trained, buckets: Buckets, parallel: ParallelConfig, dropout: bool
) -> tuple[list[NamedInstant], list[NamedInstant]]:
    """Return the instants of the forward and of the backward pass at which much memory is in use.

    Args:
        sizes: the sizes of the micro-batch.
        trained: the trained tensors.
        buckets: the gradients of those whose masters are divided.
        parallel: activation checkpointing and offloading.
        dropout: whether LoRA's inputs have dropout.
    """
    given = (sizes, trained, buckets, parallel, dropout)
    return [*ForwardPass(*given).instants()], [*BackwardPass(*given).instants()]
