"""The plain torch back end: linear memory, and float64."""

from collections import Counter
from weakref import finalize

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalard.kernels.relation_kl import (
    causal_mask,
    relation_backward,
    relation_forward,
    torch_reference,
)
from tests.kernels.cases import PAIR
from tests.kernels.oracle import make_problem, relative_error


class LiveBytes(TorchDispatchMode):
    """Records the peak number of bytes that the tensors made inside occupy.

    Attributes:
        now, peak: Bytes at the moment, and at most so far.
    """

    now = peak = 0

    def __init__(self):
        super().__init__()
        self.tensors_of_storage = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x) and x.numel():
                storage = x.untyped_storage()
                self.add(storage.data_ptr(), storage.nbytes())
                finalize(x, self.remove, storage.data_ptr(), storage.nbytes())
        return out

    def add(self, address, size):
        self.now += 0 if self.tensors_of_storage[address] else size
        self.tensors_of_storage[address] += 1
        self.peak = max(self.peak, self.now)

    def remove(self, address, size):
        self.tensors_of_storage[address] -= 1
        self.now -= 0 if self.tensors_of_storage[address] else size


def test_peak_memory_is_linear_in_the_sequence(monkeypatch):
    monkeypatch.setattr(torch_reference, "TILE_ELEMENTS", 1 << 12)
    peaks = []
    for n in (512, 1024, 2048):
        rows = torch.randn(1, 1, n, 64)
        mask = causal_mask(1, n)
        with LiveBytes() as live:
            stats = relation_forward(rows, 2 * rows, mask=mask, backend="torch")
            relation_backward(rows, 2 * rows, None, None, *stats[:2], mask=mask, backend="torch")
        peaks.append(live.peak)
    # Doubling the length doubles the growth, and a quadratic term would make it four times as
    # large. A handful of copies of operands of 64 fp32 numbers per token fit into the second bound.
    assert peaks[2] - peaks[1] < 2.2 * (peaks[1] - peaks[0])
    assert peaks[2] < 10 * 2048 * 64 * 4


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_is_quadratic_in_the_sequence(monkeypatch):
    monkeypatch.setattr(torch_reference, "TILE_ELEMENTS", 1 << 15)
    n, d = 2048, 8
    rows = torch.randn(1, 1, n, d)
    mask = causal_mask(1, n)
    with LargestTensor() as largest:
        stats = relation_forward(rows, 2 * rows, mask=mask)
        relation_backward(rows, 2 * rows, None, None, stats.lse_s, stats.lse_t, mask=mask)
    assert largest.numel <= 1 << 15


def test_float64_operands_give_float64_accuracy():
    problem = make_problem(PAIR)
    operands = [x.double() for x in problem.operands]
    options = dict(mask=problem.mask)
    stats = relation_forward(*operands, **options)
    torch.testing.assert_close(stats.kl, problem.kl, atol=1e-13, rtol=1e-12)
    grads = relation_backward(*operands, *stats[:2], problem.row_weight, **options)
    assert max(map(relative_error, grads, problem.grads)) < 1e-13
