"""The peak of a micro-batch's forward and backward pass, as the largest of a few instants.

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


def peak_of_passes(
    sizes: Sizes, trained: Trained, buckets: Buckets, parallel: ParallelConfig, dropout: bool
) -> tuple[str, Instant]:
    """Return the name and the bytes of the instant at which most memory is in use.

    Args:
        sizes: the sizes of the micro-batch.
        trained: the trained tensors.
        buckets: the gradients of those whose masters are divided.
        parallel: activation checkpointing and offloading.
        dropout: whether LoRA's inputs have dropout.
    """
    given = (sizes, trained, buckets, parallel, dropout)
    instants = [*ForwardPass(*given).instants(), *BackwardPass(*given).instants()]
    return max(instants, key=lambda pair: pair[1].total())
