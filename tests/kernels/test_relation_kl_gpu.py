"""The Triton relation KL on a CUDA device: the CPU suite's promises, longer and in every dtype."""

from dataclasses import replace
from functools import reduce

import pytest
import torch

from megalard.kernels.relation_kl import (
    IntervalMask,
    causal_mask,
    finish,
    full_mask,
    merge,
    relation_backward,
    relation_forward,
    relation_kl,
    relation_partials,
)
from megalard.kernels.relation_kl.hopper import support as hopper
from megalard.kernels.relation_kl.operands import check_operands
from megalard.kernels.relation_kl.triton import backward, forward
from tests.kernels.oracle import Case, make_problem, relative_error
from tests.kernels.test_relation_kl import (
    CASES,
    GRAD_RTOL,
    SMALL,
    check_backward_options,
    check_case,
)

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


@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=str)
def test_values_and_gradients_match_dense_float64(case):
    check_case(case, "triton", "cuda")


@pytest.mark.parametrize("case", LONG_CASES[::3], ids=str)
def test_transposed_inputs(case):
    check_case(case, "triton", "cuda", bshd=True)


def test_torch_backend_runs_on_cuda():
    check_case(LONG_CASES[1], "torch", "cuda")


def test_bf16_gradient_of_independent_normals():
    """Teacher and student unrelated, unit normal: the fp32 gradient is within 2e-3 of float64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 4, 1024, 128, generator=generator).to("cuda", torch.bfloat16)
    teacher = torch.randn(1, 4, 1024, 128, generator=generator).to("cuda", torch.bfloat16)
    mask = causal_mask(1, 1024, "cuda")
    exact = (rows.double(), teacher.double(), None, None)
    stats = relation_forward(*exact, mask=mask)
    expected = relation_backward(*exact, *stats[:2], mask=mask).cpu()
    fast = (rows, teacher, None, None)
    stats = relation_forward(*fast, mask=mask)
    grad = relation_backward(*fast, *stats[:2], mask=mask, out_dtype=torch.float32)
    assert relative_error(grad, expected) < 2e-3


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_backward_options(case):
    check_backward_options(
        replace(case, dtype=torch.float16), "triton", GRAD_RTOL[torch.float16], "cuda"
    )


def test_fp16_keeps_small_probabilities():
    """Over long flat rows D is about 1e-5, which plain fp16 would keep to a few bits."""
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


def hopper_relation(case: Case):
    """The problem and its operands, which the Hopper kernels must be written for."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    if not hopper.AVAILABLE:
        pytest.skip(f"the Hopper kernels are not used: {hopper.REASON}")
    problem = make_problem(case, "cuda")
    op = check_operands(*problem.operands, problem.mask, None, None)
    assert hopper.serves_backward(op)
    return problem, op


@pytest.mark.parametrize(
    "case",
    [
        Case(40, 64, 64, dtype=torch.bfloat16),
        Case(1000, 128, 128, dtype=torch.bfloat16, layout="packed_pad"),
        Case(1000, 64, 128, dtype=torch.float16, layout="left_pad"),
        Case(700, 128, 64, m=1300, heads=6, cols_heads=2, row_offset=600, dtype=torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("shared_from", [0, 1 << 20], ids=["shared", "apart"])
def test_hopper_writes_all_and_agrees_with_plain_triton(case, shared_from, monkeypatch):
    """Outputs poisoned with NaN; the gradient is no further from float64 than plain Triton's."""
    problem, op = hopper_relation(case)
    monkeypatch.setattr("megalard.kernels.relation_kl.hopper.backward.SHARED_FROM", shared_from)
    weight = problem.row_weight
    plain = forward.triton_forward(op, partial=False)
    plain_grads = backward.triton_backward(op, *plain[:2], weight, torch.float32)
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, poisoned)
    runs = []
    for _ in range(2):
        stats = hopper.hopper_forward(op, partial=False)
        runs.append((*stats, *hopper.hopper_backward(op, *stats[:2], weight, torch.float32)))
    monkeypatch.undo()
    for x, again in zip(*runs, strict=True):
        assert x is again or torch.equal(x, again)  # None for the columns of a self relation
    for x, y in zip(runs[0][:3], plain, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-5)
    for x, y, exact in zip(runs[0][3:], plain_grads, problem.grads, strict=False):
        error = relative_error(x, exact, floor=0.1)
        assert error < 1.1 * relative_error(y, exact, floor=0.1) + 1e-5


@pytest.mark.parametrize("layout", ["single", "packed_pad"])
def test_hopper_partials_merge_to_the_whole(layout):
    case = Case(900, 128, 128, m=900, heads=4, cols_heads=2, dtype=torch.bfloat16, layout=layout)
    problem, _ = hopper_relation(case)
    rows_s, rows_t, cols_s, cols_t = problem.operands
    mask, parts = problem.mask, []
    for start, stop in ((0, 130), (130, 131), (131, 900)):
        chunk = IntervalMask(
            (mask.col_lo_bn - start).clamp(0, stop - start),
            (mask.col_hi_bn - start).clamp(0, stop - start),
            mask.row_lo_bm[:, start:stop],
            mask.row_hi_bm[:, start:stop],
        )
        operands = (rows_s, rows_t, cols_s[:, :, start:stop], cols_t[:, :, start:stop])
        parts.append(relation_partials(*operands, mask=chunk))
    lse_s, lse_t, kl = finish(reduce(merge, parts))
    for x, expected in ((lse_s, problem.lse_s), (lse_t, problem.lse_t), (kl, problem.kl)):
        torch.testing.assert_close(x.cpu().double(), expected, atol=2e-5, rtol=1e-5)


def test_hopper_sweeps_again_where_scores_grow_along_the_row():
    """Late columns exceed the first ones by hundreds, beyond what a fixed shift can hold."""
    problem, _ = hopper_relation(Case(1500, 128, 128, b=1, dtype=torch.bfloat16))
    growth = torch.linspace(0.1, 8, 1500, device="cuda", dtype=torch.bfloat16)[:, None]
    # rows that see all columns: in a causal relation a row's own score is its largest
    rows = [x * growth.flip(0) for x in (problem.student[0], problem.teacher[0])]
    cols = [x * growth for x in (problem.student[0], problem.teacher[0])]
    mask = full_mask(1, 1500, 1500, "cuda")
    stats = relation_forward(*rows, *cols, mask=mask)
    exact = relation_forward(*(x.double() for x in (*rows, *cols)), mask=mask)
    largest = exact.lse_s.abs().max().item()
    assert largest > 100
    # A score is 8 sums of 16 terms, added by tensor cores that cut each result at 2^-22 of it. A KL
    # moves with t_j by p_j |t_j - s_j - KL|, with the s_j by 2 at most in all.
    s, t = (x.double() @ y.double().mT / 128**0.5 for x, y in zip(rows, cols, strict=True))
    score_error = 8 * 2.0**-22 * max(s.abs().max().item(), t.abs().max().item())
    gap = (t - exact.lse_t[..., None]) - (s - exact.lse_s[..., None])
    moves = 2 + (torch.softmax(t, -1) * (gap - exact.kl[..., None]).abs()).sum(-1)
    for x, expected in zip(stats[:2], exact[:2], strict=True):
        torch.testing.assert_close(x.double(), expected, atol=score_error, rtol=0)
    assert ((stats.kl - exact.kl).abs() <= score_error * moves).all()


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
    # The gradient, on Hopper an fp32 buffer of its shape, and the statistics; an n x n matrix of
    # bits would take as much as 8 times the bound.
    assert extra < 2 * (grad.numel() * (2 + 4) + 3 * heads * n * 4)


@pytest.mark.parametrize("side", ["n", "h"])
def test_offsets_beyond_31_bits(side):
    """Vectors spread over more than 2**31 elements give the same bits as packed ones."""
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
