"""The exchange of tensors between two ranks of an axis."""

from __future__ import annotations

import torch

from megalard.parallel.context.exchange import Exchange
from megalard.parallel.mesh import build_mesh
from tests.ranks import run_ranks


def _shift_by_two() -> None:
    """Every rank of three sends to the rank two further on, tensors of two dtypes."""
    axis = build_mesh("cpu", 1, 3).cp
    tensors = [torch.full((2, 3), float(axis.rank)), torch.full((5,), axis.rank).bfloat16()]
    exchange = Exchange(tensors, (axis.rank + 2) % 3, (axis.rank - 2) % 3, axis)
    assert exchange.sent_bytes == 2 * 3 * 4 + 5 * 2
    received = exchange.wait()
    for tensor, sent in zip(received, tensors, strict=True):
        assert (tensor.dtype, tensor.shape) == (sent.dtype, sent.shape)
        assert bool((tensor == (axis.rank - 2) % 3).all())
    assert bool((tensors[0] == axis.rank).all()), "the sent tensors are unchanged"


def test_tensors_arrive_from_the_source():
    run_ranks(3, _shift_by_two)
