"""How often the backward kernel runs, and its weights. Its results are tested in test_op."""

import pytest
import torch

from megalard.kernels.relation_kl import relation_backward, relation_forward
from tests.kernels.cases import PAIR, SELF, ignore_masked_lanes, needs_interpreter
from tests.kernels.oracle import make_problem
from tests.kernels.test_triton_forward import CountedKernel

backward = pytest.importorskip("megalard.kernels.relation_kl.triton.backward")
pytestmark = ignore_masked_lanes


@needs_interpreter
@pytest.mark.parametrize(("case", "launches"), [(SELF, 1), (PAIR, 2)], ids=["self", "pair"])
def test_a_self_relation_takes_one_launch_and_two_operands_take_two(case, launches, monkeypatch):
    kernel = CountedKernel(backward._backward_kernel)
    monkeypatch.setattr(backward, "_backward_kernel", kernel)
    problem = make_problem(case)
    stats = relation_forward(*problem.operands, mask=problem.mask, backend="triton")
    relation_backward(*problem.operands, *stats[:2], mask=problem.mask, backend="triton")
    assert kernel.launches == launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_two_parts_of_a_row_weight_multiply_to_it(dtype):
    """The quotient and the product round once each, hence the relative error of 1e-6."""
    weight = torch.randn(2, 3, 5).mul(7)
    per_row, unit = backward.split_weight(weight, dtype)
    product = per_row if unit is None else per_row * unit
    torch.testing.assert_close(product, weight, rtol=1e-6, atol=0)


def test_an_expanded_weight_is_a_factor_and_costs_nothing_per_row():
    expanded = torch.tensor(0.5).expand(2, 3, 5)
    per_row, unit = backward.split_weight(expanded, torch.bfloat16)
    assert per_row is None and unit is expanded
    assert backward.split_weight(None, torch.bfloat16) == (None, None)


def test_fp16_weights_are_at_most_1_so_that_the_scaled_difference_fits_fp16():
    per_row, _ = backward.split_weight(torch.randn(2, 3, 5).mul(1e4), torch.float16)
    assert per_row.abs().max() == 1
    largest = 2 * 2.0**backward.FP16_LOG2_GAIN  # both roles of a pair
    assert largest < torch.finfo(torch.float16).max
    per_row, _ = backward.split_weight(torch.zeros(2, 3, 5), torch.float16)
    assert not per_row.any()
