"""Copies between host and GPU that the host does not wait for, so that kernels stay queued."""

from __future__ import annotations

from collections.abc import Callable

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return ``tensor`` on ``device``; the host does not wait for a copy to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: torch.Tensor) -> Callable[[], list]:
    """Start to copy a tensor to the host; return a function that waits for the copy.

    The function returns the tensor's values as a list. It waits for this copy alone, so that work
    which is queued after this call continues meanwhile.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def values() -> list:
        copied.synchronize()
        return host.tolist()

    return values
