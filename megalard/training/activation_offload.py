"""What autograd saves for the backward pass, kept in host memory.

The copies run in a CUDA stream of their own, next to the computation:

    forward    layer 0 | layer 1         | layer 2         | ...
    copies               0 to the host     1 to the host
    backward             ... | layer 2             | layer 1             | layer 0
    copies                     1 to the GPU          0 to the GPU

A tensor is fetched when one that was saved ``AHEAD`` places later is read, because the backward
pass reads in the reverse order. If it reads in another order, the result is the same and the GPU
waits.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

AHEAD = 4
"""Tensors that are on the GPU before they are read, and tensors that are leaving it. A layer under
activation checkpointing saves four: its input, and the gradients by q, k and v."""


class ActivationOffload:
    """Where the saved tensors of one micro-batch after the other are kept.

    Args:
        device: the device of the computation. Nothing is copied if it is the CPU.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def forward(self) -> AbstractContextManager:
        """Return the context for the forward pass of a micro-batch.

        What autograd saves inside is copied to host memory, except scalars and parameters.
        """
        if self._stream is None:
            return nullcontext()
        tensors = _SavedTensors(self._stream)
        return saved_tensors_hooks(tensors.pack, tensors.unpack)


class _Saved:
    """A tensor in pinned host memory, and on the GPU while it arrives there.

    Attributes:
        host: the values, once the copy stream has reached the copy.
        place: the number of tensors that were saved before.
    """

    def __init__(self, host: torch.Tensor, place: int):
        self.host, self.place = host, place
        self._fetched: torch.Tensor | None = None
        self._arrived = torch.cuda.Event()

    def fetch(self, stream: torch.cuda.Stream, device: torch.device) -> None:
        """Start to copy the values to the GPU, unless that was done."""
        if self._fetched is not None:
            return
        # The memory belongs to the stream of the computation, which may still read what was there.
        self._fetched = torch.empty_like(self.host, device=device, pin_memory=False)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._fetched.copy_(self.host, non_blocking=True)
            self._arrived.record(stream)

    def take(self, device: torch.device) -> torch.Tensor:
        """Return the fetched tensor; the GPU waits for it."""
        fetched, self._fetched = self._fetched, None
        self._arrived.wait(torch.cuda.current_stream(device))
        return fetched

    def __del__(self):
        # The memory of a tensor that nobody read is free when the copy into it has ended.
        if self._fetched is not None:
            self.take(self._fetched.device)


def leaves_the_gpu(tensor: torch.Tensor) -> bool:
    """Whether a saved tensor is copied: no scalar, no parameter and no view of a parameter."""
    owner = tensor if tensor._base is None else tensor._base
    return tensor.ndim > 0 and not isinstance(owner, nn.Parameter)


class _SavedTensors:
    """The saved tensors of one micro-batch, in the order in which they were saved."""

    def __init__(self, stream: torch.cuda.Stream):
        self._stream = stream
        self._saved: list[_Saved] = []
        self._leaving: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        """Start to copy a tensor to the host; return what autograd keeps in its place."""
        if not tensor.is_cuda or not leaves_the_gpu(tensor):
            return tensor
        # A tensor must live until it is copied. The host waits here if it is far ahead of the
        # copies; otherwise all tensors of a forward pass would be in memory at the same time.
        while len(self._leaving) >= AHEAD:
            self._leaving.popleft()[0].synchronize()
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
            copied = self._stream.record_event()
        self._leaving.append((copied, tensor))
        saved = _Saved(host, len(self._saved))
        self._saved.append(saved)
        return saved

    def unpack(self, kept: torch.Tensor | _Saved) -> torch.Tensor:
        """Return the tensor that ``pack`` got."""
        if isinstance(kept, torch.Tensor):
            return kept
        device = self._stream.device
        kept.fetch(self._stream, device)
        tensor = kept.take(device)
        for saved in reversed(self._saved[max(0, kept.place - AHEAD) : kept.place]):
            saved.fetch(self._stream, device)
        # What was saved later has been read. What was leaving has been copied before ``tensor``
        # was, and the GPU waits for that.
        del self._saved[kept.place :]
        self._leaving.clear()
        return tensor
