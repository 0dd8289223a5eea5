"""Gradients on the way: the buckets of ``megalard.training.masters.sharded``, in bytes.

The backward pass leaves gradients in the compute dtype. When all gradients of a bucket exist, they
are packed in ``parallel.gradient_dtype``, and the packed tensor is reduce-scattered. At most two
buckets are on the way, also after the end of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megalard.config.schema import ParallelConfig
from megalard.estimate.sizes import FP32_BYTES
from megalard.estimate.trained import Trained, gradient_bytes

BUCKET_ELEMENTS = 2**25
_IN_FLIGHT = 2


@dataclass(frozen=True)
class Bucket:
    """Trained tensors whose gradients are sent together.

    Attributes:
        names: the tensors.
        elements: the number of their elements.
        share: the elements of one rank's part, with padding.
        gathered: those of them that are gathered after the update, and not layer by layer.
        holders: the ranks that the bucket is divided over.
    """

    names: frozenset[str]
    elements: int
    share: int
    gathered: int
    holders: int

    @property
    def packed(self) -> int:
        """The elements of the packed tensor."""
        return self.share * self.holders

    @property
    def sent(self) -> int:
        """The elements of the packed tensor and of its sum, if there is anything to send."""
        return self.packed + self.share if self.holders > 1 else 0


class Buckets:
    """The buckets of a stage, in the order in which the backward pass fills them.

    Args:
        trained: the trained tensors.
        parallel: the dtype of gradients, and whether masters are in host memory.
        element: bytes of an element in the compute dtype.
        is_repeated: whether a step has several micro-batches, so that the last gradients of one
            are on the way while the next one begins.
    """

    def __init__(self, trained: Trained, parallel: ParallelConfig, element: int, is_repeated: bool):
        self.buckets = list(_filled(trained))
        self._elements = {name: tensor.elements for name, tensor in trained.divided.items()}
        self._element, self._gradient = element, gradient_bytes(parallel)
        self._is_offloaded, self._is_repeated = parallel.offload_optimizer, is_repeated

    def waiting(self, computed: Collection[str] = ()) -> int:
        """Return the bytes of gradients that are on the way or that wait for their bucket.

        Args:
            computed: the tensors whose gradients the backward pass has computed.
        """
        sent = self._sent(computed)
        return self._in_flight(sent, _IN_FLIGHT) + self._unsent(sent, computed)

    def packing(self, computed: Collection[str], last: str) -> int:
        """Return the bytes of gradients while the bucket is packed that a gradient completes.

        Args:
            computed: as for ``waiting``, without ``last``.
            last: the tensor whose gradient has just been computed.
        """
        after, sent = {*computed, last}, self._sent(computed)
        total = self._unsent(sent, after)
        if self._sent(after) > sent:
            total += self._in_flight(sent, _IN_FLIGHT - 1)
            return total + self._gradient * self.buckets[sent].packed
        return total + self._in_flight(sent, _IN_FLIGHT)

    def updated(self) -> int:
        """Return the bytes of fp32 gradients on the GPU that are copies for the update.

        AdamW on the GPU reads all of them at once. One bucket after the other goes to the host.
        """
        if self._gradient == FP32_BYTES or not self.buckets:
            return 0
        shares = [bucket.share for bucket in self.buckets]
        return FP32_BYTES * (max(shares) if self._is_offloaded else sum(shares))

    def published(self) -> int:
        """Return the most bytes of gathered weights after the update.

        Two buckets are on the way, and a third one starts when the first has ended.
        """
        sizes = []
        for bucket in reversed(self.buckets):
            rounded = self._element * bucket.gathered if self._is_rounded else 0
            from_host = FP32_BYTES * bucket.gathered if self._is_offloaded else 0
            packed = bucket.gathered * bucket.holders
            gathered = self._element * packed if bucket.holders > 1 else 0
            sizes.append((rounded + gathered, rounded + from_host))
        most = 0
        for number, (_, starting) in enumerate(sizes):
            waiting = sum(size for size, _ in sizes[max(0, number + 1 - _IN_FLIGHT) : number])
            most = max(most, waiting + starting, waiting + sizes[number][0])
        return most

    @property
    def _is_rounded(self) -> bool:
        return self._element < FP32_BYTES or self._is_offloaded

    def _sent(self, computed: Collection[str]) -> int:
        """Return the number of buckets that are complete, and all before them too."""
        names = set(computed)
        for number, bucket in enumerate(self.buckets):
            if not bucket.names <= names:
                return number
        return len(self.buckets)

    def _in_flight(self, sent: int, count: int) -> int:
        """Return the bytes of the last ``count`` buckets that were sent."""
        order = list(range(len(self.buckets))) if self._is_repeated else []
        order = [number for number in order if number >= sent] + list(range(sent))
        return self._gradient * sum(self.buckets[number].sent for number in order[-count:])

    def _unsent(self, sent: int, computed: Collection[str]) -> int:
        """Return the bytes of gradients whose bucket is not complete."""
        left = {name for bucket in self.buckets[sent:] for name in bucket.names}
        return self._element * sum(self._elements[name] for name in left.intersection(computed))


def _filled(trained: Trained) -> list[Bucket]:
    """Return the buckets: each of tensors with equally many holders, from the end of the model."""
    open_buckets: dict[int, list[str]] = {}
    filled: list[Bucket] = []
    for name, tensor in reversed(list(trained.divided.items())):
        names = open_buckets.setdefault(tensor.holders, [])
        names.append(name)
        if sum(trained.tensors[name].elements for name in names) >= BUCKET_ELEMENTS:
            filled.append(_bucket(trained, open_buckets.pop(tensor.holders)))
    return [*filled, *(_bucket(trained, names) for names in open_buckets.values())]


def _bucket(trained: Trained, names: list[str]) -> Bucket:
    tensors = [trained.tensors[name] for name in names]
    return Bucket(
        frozenset(names),
        sum(tensor.elements for tensor in tensors),
        sum(tensor.share for tensor in tensors),
        sum(tensor.share for tensor in tensors if not tensor.has_rows),
        tensors[0].holders,
    )
