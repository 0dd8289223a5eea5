"""The relation KL on a CUDA device keeps the promises of test_op: longer, and in every dtype."""

from dataclasses import replace

import pytest
import torch

from megalard.kernels.relation_kl import (
    causal_mask,
    relation_backward,
    relation_forward,
    relation_kl,
)
from tests.kernels.cases import (
    CASES,
    GRAD_RTOL,
    SMALL,
    case_params,
    check_backward_options,
    check_case,
)
from tests.kernels.oracle import Case, make_problem, relative_error

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG_CASES = [
    replace(case, dtype=dtype)
    for dtype in DTYPES
    for case in (
        Case(1000, 128, 128),
        Case(1000, 128, 64, layout="packed_pad"),
        Case(1000, 96, 112, layout="left_pad"),
        Case(1000, 80, 80, causal=False, layout="both_pad"),
        Case(1000, 128, 128, m=700, heads=4, cols_heads=1, row_offset=500, layout="packed"),
        Case(700, 64, 128, m=1000, heads=4, cols_heads=2, causal=False),
        Case(513, 256, 256, b=1),
        Case(2049, 64, 64, b=1, layout="packed"),
        Case(2049, 128, 128, b=1),
    )
]


@case_params(CASES + LONG_CASES)
def test_values_and_gradients_match_dense_float64(case):
    check_case(case, "triton", "cuda")


@case_params(LONG_CASES[::3])
def test_transposed_inputs_match_dense_float64(case):
    check_case(case, "triton", "cuda", bshd=True)


def test_plain_torch_serves_cuda_tensors():
    check_case(LONG_CASES[1], "torch", "cuda")


def test_the_bf16_gradient_of_independent_normals_is_within_2e_3_of_float64():
    """D is rounded to bf16 once, with an rms of 1.7e-3; the sums and the gradient are fp32."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 4, 1024, 128, generator=generator).to("cuda", torch.bfloat16)
    teacher = torch.randn(1, 4, 1024, 128, generator=generator).to("cuda", torch.bfloat16)
    mask = causal_mask(1, 1024, "cuda")
    exact = (rows.double(), teacher.double(), None, None)
    stats = relation_forward(*exact, mask=mask)
    expected = relation_backward(*exact, *stats[:2], mask=mask).cpu()
    rounded = (rows, teacher, None, None)
    stats = relation_forward(*rounded, mask=mask)
    grad = relation_backward(*rounded, *stats[:2], mask=mask, out_dtype=torch.float32)
    assert relative_error(grad, expected) < 2e-3


@case_params(SMALL)
def test_every_kind_of_row_weight_and_output_dtype_is_served(case):
    check_backward_options(
        replace(case, dtype=torch.float16), "triton", GRAD_RTOL[torch.float16], "cuda"
    )


def test_fp16_keeps_small_probabilities():
    """D is about 1e-5 over long flat rows; unscaled, fp16 would keep only a few bits of it."""
    n, d = 8192, 64
    rows, teacher = (0.3 * torch.randn(1, 1, n, d, device="cuda").half() for _ in range(2))
    mask = causal_mask(1, n, "cuda")
    grads = []
    for dtype in (torch.float16, torch.float32):
        x, y = rows.to(dtype), teacher.to(dtype)
        stats = relation_forward(x, y, mask=mask)
        options = dict(mask=mask, out_dtype=torch.float32)
        grads.append(relation_backward(x, y, None, None, *stats[:2], **options))
    assert relative_error(grads[0], grads[1].double().cpu()) < GRAD_RTOL[torch.float16]


def test_two_runs_are_bit_identical():
    problem = make_problem(Case(1500, 128, 128, dtype=torch.bfloat16, layout="packed"), "cuda")
    leaves = [x.requires_grad_() for x in problem.student]
    runs = []
    for _ in range(2):
        kl = relation_kl(*problem.operands, mask=problem.mask)
        runs.append([kl.detach(), *torch.autograd.grad(kl, leaves, problem.row_weight)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_memory_is_linear_in_the_sequence():
    n, heads, d = 32768, 2, 128
    rows, teacher = (
        torch.randn(1, heads, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    mask = causal_mask(1, n, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stats = relation_forward(rows, teacher, mask=mask)
    grad = relation_backward(rows, teacher, None, None, *stats[:2], mask=mask)
    extra = torch.cuda.max_memory_allocated() - before
    assert grad.isfinite().all()
    # The gradient, an fp32 buffer of its shape (on Hopper) and the statistics. A matrix of n x n
    # bits would take 8 times this bound.
    assert extra < 2 * (grad.numel() * (2 + 4) + 3 * heads * n * 4)


@pytest.mark.parametrize("side", ["n", "h"])
def test_offsets_beyond_31_bits_are_right(side):
    """Vectors that are spread over more than 2**31 elements give the same bits as dense ones."""
    heads, n, d = 3, 300, 64
    wide = (1 << 31) // (n - 20 if side == "n" else heads - 1)
    strides = (0, d, wide, 1) if side == "n" else (0, wide, d, 1)
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    storage = torch.empty(wide * (n if side == "n" else heads), device="cuda", dtype=torch.bfloat16)
    rows = storage.as_strided((1, heads, n, d), strides)
    rows.copy_(torch.randn(1, heads, n, d, device="cuda"))
    teacher = torch.randn(1, heads, n, d, device="cuda", dtype=torch.bfloat16)
    mask = causal_mask(1, n, "cuda")
    results = []
    for student in (rows, rows.contiguous()):
        stats = relation_forward(student, teacher, mask=mask)
        grad = relation_backward(student, teacher, None, None, *stats[:2], mask=mask)
        results.append((*stats, grad))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
