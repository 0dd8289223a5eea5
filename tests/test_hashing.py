"""The hash of places, against the same function in numpy's 32-bit arithmetic."""

from __future__ import annotations

import numpy as np
import torch

from megalard.hashing import mixed


def lowbias32(x: np.ndarray) -> np.ndarray:
    """Return the hash with the constants that its author found for the least bias.

    Chris Wellons, "Prospecting for Hash Functions", 2018.
    """
    x = x.astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def test_it_is_lowbias32():
    numbers = np.concatenate([np.arange(1000), 2**32 - 1 - np.arange(1000), 2 ** np.arange(32)])
    expected = lowbias32(numbers).astype(np.int64)
    assert mixed(torch.from_numpy(numbers)).tolist() == expected.tolist()
