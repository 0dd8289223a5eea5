"""Count the bytes of live tensors of one device, and their peak, while code runs."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BLOCK = 512  # the allocator of CUDA rounds up to it


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from their making until they are freed.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self._sizes: dict[int, tuple[int, weakref.ref]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == self.device:
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // _BLOCK) * _BLOCK
        if key in self._sizes or not size:
            return
        self._sizes[key] = size, weakref.ref(storage, lambda _: self._free(key))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        size, _ = self._sizes.pop(key, (0, None))
        self.now -= size
