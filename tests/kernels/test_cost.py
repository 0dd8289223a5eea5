"""What the relation KL costs, as far as a CPU can see it: memory and kernel launches."""

from collections import Counter
from weakref import finalize

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalard.kernels import relation_kl as package
from megalard.kernels.relation_kl import (
    causal_mask,
    relation_backward,
    relation_forward,
)
from megalard.kernels.relation_kl import (
    torch_reference as reference,
)
from tests.kernels.oracle import make_problem
from tests.kernels.test_relation_kl import HAS_CUDA, SMALL

# Masked lanes hold inf - inf before they are dropped; on a GPU that is silent.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


class LiveBytes(TorchDispatchMode):
    """Records the most bytes that the tensors made inside hold at a time."""

    now = most = 0

    def __init__(self):
        super().__init__()
        self.holders = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x) and x.numel():
                storage = x.untyped_storage()
                self.hold(storage.data_ptr(), storage.nbytes())
                finalize(x, self.release, storage.data_ptr(), storage.nbytes())
        return out

    def hold(self, address, size):
        self.now += 0 if self.holders[address] else size
        self.holders[address] += 1
        self.most = max(self.most, self.now)

    def release(self, address, size):
        self.holders[address] -= 1
        self.now -= 0 if self.holders[address] else size


def test_peak_memory_of_the_torch_path_is_linear_in_the_sequence(monkeypatch):
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1 << 12)
    peaks = []
    for n in (512, 1024, 2048):
        rows = torch.randn(1, 1, n, 64)
        mask = causal_mask(1, n)
        with LiveBytes() as live:
            stats = relation_forward(rows, 2 * rows, mask=mask, backend="torch")
            relation_backward(rows, 2 * rows, None, None, *stats[:2], mask=mask, backend="torch")
        peaks.append(live.most)
    # operands of 64 numbers a token in fp32: a handful of copies, no row of a matrix a token
    assert peaks[2] - peaks[1] < 2.2 * (peaks[1] - peaks[0])
    assert peaks[2] < 10 * 2048 * 64 * 4


class CountedKernel:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.skipif(HAS_CUDA, reason="CPU tensors need the interpreter")
@pytest.mark.parametrize(
    ("case", "launches"), [(SMALL[0], [1, 1]), (SMALL[1], [1, 2])], ids=["self", "pair"]
)
def test_kernel_launches(case, launches, monkeypatch):
    """One forward; one backward for a self relation, one more for columns of their own."""
    kernels = []
    for module, name in (
        (package.forward, "_forward_kernel"),
        (package.backward, "_backward_kernel"),
    ):
        kernels.append(CountedKernel(getattr(module, name)))
        monkeypatch.setattr(module, name, kernels[-1])
    problem = make_problem(case)
    stats = relation_forward(*problem.operands, mask=problem.mask, backend="triton")
    relation_backward(*problem.operands, *stats[:2], mask=problem.mask, backend="triton")
    assert [kernel.launches for kernel in kernels] == launches
