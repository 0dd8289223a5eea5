"""What a GPU is, where a choice between kernels depends on it."""

from __future__ import annotations

import functools

import torch

_HOPPER = 9


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU of the Hopper family, such as an H100."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER
