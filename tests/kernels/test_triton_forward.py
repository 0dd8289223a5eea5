"""How often the forward kernel runs. Its results are tested in test_op."""

import pytest

from megalard.kernels.relation_kl import relation_forward, relation_partials
from tests.kernels.cases import SMALL, ignore_masked_lanes, needs_interpreter
from tests.kernels.oracle import make_problem

forward = pytest.importorskip("megalard.kernels.relation_kl.triton.forward")
pytestmark = ignore_masked_lanes


class CountedKernel:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@needs_interpreter
@pytest.mark.parametrize("case", SMALL, ids=["self", "pair"])
@pytest.mark.parametrize("operation", [relation_forward, relation_partials])
def test_statistics_and_partials_take_one_launch(case, operation, monkeypatch):
    kernel = CountedKernel(forward._forward_kernel)
    monkeypatch.setattr(forward, "_forward_kernel", kernel)
    problem = make_problem(case)
    operation(*problem.operands, mask=problem.mask, backend="triton")
    assert kernel.launches == 1
