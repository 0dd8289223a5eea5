"""The parity of ``test_parity`` on GPUs, over NCCL and with the Triton kernels."""

from __future__ import annotations

import math

import pytest
import torch

from tests.logits import relative_error
from tests.parity.cases import CASES
from tests.parity.compare import FP32_TOLERANCE, assert_step_matches, reference
from tests.parity.worker import Run, run_all
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu
# (dp, cp, tp)
LAYOUTS = [(1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 1), (1, 1, 4), (2, 1, 2), (1, 4, 1), (1, 2, 2)]

# A bf16 gradient is 1e-2 to 1e-1 from float64 where terms cancel, and another order of summation
# gives another error of this size. A layout must not add to it: measured against float64 its error
# may be twice the error of one GPU, plus the rounding of the tensor. The norms of two independent
# errors of m elements differ by chance too. The logarithm of their ratio has a standard deviation
# of 1 / sqrt(m). 4.5 standard deviations allow for thousands of tensors; they are more than a
# factor of two for biases and norms of fewer than 42 elements.
BF16_FACTOR, BF16_DEVIATIONS, BF16_ROUNDING = 2.0, 4.5, 1e-2


@pytest.fixture(scope="session", params=LAYOUTS, ids=lambda axes: "dp{}-cp{}-tp{}".format(*axes))
def layout(request):
    """A layout for which there are enough GPUs."""
    needed = math.prod(request.param)
    if needed > torch.cuda.device_count():
        pytest.skip(f"needs {needed} GPUs")
    return request.param


def run(models, layout, dtype):
    """Return the results of all cases on a layout, computed once."""
    file = models / f"gpu-{dtype}-{'-'.join(map(str, layout))}.pt"
    if not file.exists():
        runs = [Run(layout, list(CASES), dtype, str(file))]
        run_ranks(math.prod(layout), run_all, str(models), "cuda", runs)
    return torch.load(file)


@pytest.mark.parametrize("name", CASES)
def test_fp32_step_matches_one_process(name, layout, models):
    ours = run(models, layout, "float32")[name]
    assert_step_matches(ours, reference(name, models, ours["start"]), FP32_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_bf16_step_is_as_exact_as_on_one_gpu(name, layout, models):
    single = run(models, (1, 1, 1), "bfloat16")[name]
    ours = run(models, layout, "bfloat16")[name]
    plain = reference(name, models, ours["start"], "bfloat16")
    assert ours["loss"] == pytest.approx(plain["loss"], rel=5e-2)
    for kind in ("gradients", "weights"):
        for tensor, value in plain[kind].items():
            factor = max(BF16_FACTOR, math.exp(BF16_DEVIATIONS / math.sqrt(value.numel())))
            allowed = factor * relative_error(single[kind][tensor], value) + BF16_ROUNDING
            error = relative_error(ours[kind][tensor], value)
            assert error < allowed, f"{kind} of {tensor} off by {error:.2e}, one GPU {allowed:.2e}"
