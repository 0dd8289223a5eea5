"""The host memory that one rank needs: what is offloaded, by kind.

torch's allocator of pinned memory rounds every tensor up to a power of two bytes. The moments of
AdamW are not pinned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megalard.config.schema import ParallelConfig
from megalard.estimate.buckets import Buckets
from megalard.estimate.sizes import FP32_BYTES
from megalard.estimate.trained import TrainedState

HOST = "optimizer's state in host memory"
SAVED = "saved tensors in host memory"
ROUNDED_UP = "rounding of pinned tensors"

SETTINGS = {HOST: "parallel.offload_optimizer", SAVED: "parallel.offload"}
"""By kind: the setting that keeps it in host memory."""


def host_memory(
    state: TrainedState,
    buckets: Buckets,
    saved: Iterable[list[int]],
    parallel: ParallelConfig,
) -> Counter:
    """Return the bytes in host memory by kind, empty if nothing is offloaded.

    Args:
        state: the bytes of the trained tensors.
        buckets: the buckets of trained tensors. Their masters and gradients are pinned.
        saved: the bytes of each tensor that a micro-batch of each stream keeps until its backward
            pass. One micro-batch is in memory at a time.
        parallel: what is offloaded.
    """
    kinds: Counter = Counter()
    if parallel.offload_optimizer:
        pinned = [FP32_BYTES * bucket.share for bucket in buckets.buckets for _ in range(2)]
        kinds[HOST] = state.host
        kinds[ROUNDED_UP] = _rounded_up(pinned)
    if parallel.offload:
        largest = max(saved, key=sum)
        kinds[SAVED] = sum(largest)
        kinds[ROUNDED_UP] += _rounded_up(largest)
    return +kinds


def _rounded_up(sizes: Iterable[int]) -> int:
    """Return the bytes by which powers of two exceed the sizes."""
    return sum((1 << (size - 1).bit_length()) - size for size in sizes if size)
