"""LoRA merged in blocks of rows: the bits of one product, in the memory of the weight itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalard.checkpoint import weights as merged
from megalard.checkpoint.weights import merge_lora


def whole(original, lora_a, lora_b, scale):
    """The merge in one product, as the formula reads."""
    return (lora_b @ lora_a * scale + original.float()).to(original.dtype)


def pair(rows: int, columns: int, rank: int):
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, columns), (rank, columns), (rows, rank))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(1, 1000, 4), (129, 1001, 1), (1003, 257, 6), (777, 333, 17), (1499, 16, 3), (900, 5, 4)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_blocks_have_the_bits_of_the_whole(rows, columns, rank, dtype, monkeypatch):
    monkeypatch.setattr(merged, "BLOCK_ELEMENTS", 10_000)
    original, lora_a, lora_b = pair(rows, columns, rank)
    original = original.to(dtype)
    expected = whole(original.clone(), lora_a, lora_b, 1.7)
    found = merge_lora("w", original, lora_a, lora_b, 1.7)
    assert found.dtype == dtype and torch.equal(found, expected)


class LargestMade(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation brings into being."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


def test_a_merge_takes_little_beside_the_weight():
    original, lora_a, lora_b = pair(3001, 4099, 8)
    original = original.bfloat16()
    with LargestMade() as made:
        found = merge_lora("w", original, lora_a, lora_b, 0.5)
    assert found.data_ptr() == original.data_ptr()
    assert 0 < made.nbytes <= 4 * merged.BLOCK_ELEMENTS < original.nbytes
