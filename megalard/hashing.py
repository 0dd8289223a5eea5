"""Numbers that look random and are a function of their place, on any device."""

from __future__ import annotations

import torch


def mixed(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit numbers: two rounds of xor-shift and multiply, in int64 arithmetic."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
