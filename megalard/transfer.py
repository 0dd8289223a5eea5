"""Copies between host and GPU that neither waits for, so that kernels stay queued."""

from __future__ import annotations

from collections.abc import Callable

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``; to a GPU from pinned memory, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: torch.Tensor) -> Callable[[], list]:
    """Start copying; calling what is returned waits for this copy alone and gives the numbers.

    What is queued after this call goes on while the numbers are waited for.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def numbers() -> list:
        copied.synchronize()
        return host.tolist()

    return numbers
