"""The relation KL on the CPU, in plain torch and in interpreted Triton, against dense float64."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from megalard.kernels.relation_kl import (
    IntervalMask,
    Partials,
    finish,
    full_mask,
    merge,
    operands,
    relation_backward,
    relation_kl,
    relation_partials,
    rescale,
)
from tests.kernels.cases import (
    CASES,
    GRAD_RTOL,
    MANY_BLOCKS,
    PAIR,
    SELF,
    SMALL,
    VALUE_ATOL,
    bf16,
    both_backends,
    case_params,
    check_backward_options,
    check_case,
    fp16,
    ignore_masked_lanes,
    poison_allocations,
)
from tests.kernels.oracle import Case, make_problem, relative_error

pytest.importorskip("triton")
pytestmark = ignore_masked_lanes


@both_backends
@case_params(CASES)
def test_values_and_gradients_match_dense_float64(case, backend):
    check_case(case, backend)


@both_backends
@case_params([*MANY_BLOCKS, *SMALL])
def test_values_and_gradients_match_over_many_tiles(case, backend, tiny_tiles):
    check_case(case, backend)


@both_backends
@case_params([replace(PAIR, n=33), replace(SELF, dtype=bf16)])
def test_transposed_inputs_need_no_copy(case, backend, monkeypatch):
    """``with_unit_strides`` is the only place that copies operands, by ``replace``."""
    monkeypatch.setattr(operands, "replace", None)
    check_case(case, backend, bshd=True)


@both_backends
def test_a_strided_last_dimension_is_accepted(backend):
    problem = make_problem(SELF)
    rows_s, rows_t = (x.mT.contiguous().mT for x in (problem.student[0], problem.teacher[0]))
    assert rows_s.stride(3) != 1
    kl = relation_kl(rows_s, rows_t, mask=problem.mask, backend=backend)
    torch.testing.assert_close(kl.double(), problem.kl, atol=VALUE_ATOL, rtol=1e-5)


@both_backends
@case_params(SMALL)
def test_every_kind_of_row_weight_and_output_dtype_is_served(case, backend):
    """On the CPU fp16 operands are multiplied in fp32, so the fp32 tolerance holds."""
    check_backward_options(replace(case, dtype=fp16), backend, rtol=GRAD_RTOL[torch.float32])


@both_backends
def test_the_gradient_reaches_the_student_only(backend):
    problem = make_problem(PAIR)
    for x in (*problem.student, *problem.teacher):
        x.requires_grad_()
    kl = relation_kl(*problem.operands, mask=problem.mask, backend=backend)
    kl.mean().backward()
    assert all(x.grad is not None for x in problem.student)
    assert all(x.grad is None for x in problem.teacher)


@both_backends
@case_params(
    [
        replace(SELF, b=1),
        Case(34, 16, 16, heads=1, layout="single"),
        Case(34, 16, 16, b=1, causal=False),
    ]
)
def test_partials_over_column_splits_merge_to_the_entire_row(case, backend, tiny_tiles):
    """The columns of a self relation are cut in four; the gradients of the parts are summed."""
    problem = make_problem(case)
    (rows_s,), (rows_t,) = problem.student, problem.teacher
    mask, cuts = problem.mask, [0, 7, 8, 31, case.n]
    parts, chunks = [], []
    for start, stop in pairwise(cuts):
        m = stop - start
        chunk = IntervalMask(
            (mask.col_lo_bn - start).clamp(0, m),
            (mask.col_hi_bn - start).clamp(0, m),
            mask.row_lo_bm[:, start:stop],
            mask.row_hi_bm[:, start:stop],
        )
        vectors = (rows_s, rows_t, rows_s[:, :, start:stop], rows_t[:, :, start:stop])
        chunks.append((vectors, chunk, slice(start, stop)))
        parts.append(relation_partials(*vectors, mask=chunk, backend=backend))

    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    m_s = torch.stack([part.m_s for part in parts]).amax(0)
    m_t = torch.stack([part.m_t for part in parts]).amax(0)
    sums = [torch.stack(x).sum(0) for x in zip(*(rescale(p, m_s, m_t) for p in parts), strict=True)]
    reduced = Partials(m_s, sums[1], m_t, sums[3], sums[4])
    for partials in (merged, reduced):
        lse_s, lse_t, kl = finish(partials)
        for actual, expected in ((lse_s, problem.lse_s), (lse_t, problem.lse_t), (kl, problem.kl)):
            torch.testing.assert_close(actual.double(), expected, atol=VALUE_ATOL, rtol=1e-5)

    total = torch.zeros_like(rows_s)
    for vectors, chunk, columns in chunks:
        grad_rows, grad_cols = relation_backward(
            *vectors, lse_s, lse_t, problem.row_weight,
            mask=chunk, backend=backend, out_dtype=torch.float32,
        )  # fmt: skip
        total += grad_rows
        total[:, :, columns] += grad_cols
    assert relative_error(total, problem.grads[0]) < GRAD_RTOL[torch.float32]


@both_backends
@case_params(SMALL)
def test_every_output_element_is_written(case, backend, monkeypatch):
    poison_allocations(monkeypatch)
    check_case(case, backend)


@both_backends
@case_params([replace(SELF, b=1), replace(PAIR, heads=2, cols_heads=1)])
def test_two_runs_are_bit_identical(case, backend, tiny_tiles):
    problem = make_problem(case)
    leaves = [x.requires_grad_() for x in problem.student]
    runs = []
    for _ in range(2):
        kl = relation_kl(*problem.operands, mask=problem.mask, backend=backend)
        runs.append([kl.detach(), *torch.autograd.grad(kl, leaves, problem.row_weight)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@both_backends
def test_equal_student_and_teacher_give_zero(backend):
    """The bounds are fp32 rounding of scores of a few nats."""
    problem = make_problem(SELF)
    rows = problem.student[0].requires_grad_()
    kl = relation_kl(rows, rows.detach(), mask=problem.mask, backend=backend)
    assert kl.abs().max() < 1e-6
    assert torch.autograd.grad(kl.sum(), rows)[0].abs().max() < 1e-6


@both_backends
def test_large_scores_do_not_overflow(backend):
    case = Case(40, 16, 16, scale_s=30.0, scale_t=20.0)
    problem = make_problem(case)
    leaves = [x.requires_grad_() for x in problem.student]
    options = dict(mask=problem.mask, scale_s=30.0, scale_t=20.0, backend=backend)
    kl = relation_kl(*problem.operands, **options)
    # Scores of about 1e3 carry an absolute fp32 rounding of about 1e-4.
    torch.testing.assert_close(kl.detach().double(), problem.kl, atol=1e-3, rtol=1e-5)
    grads = torch.autograd.grad(kl, leaves, problem.row_weight)
    assert relative_error(grads[0], problem.grads[0]) < 1e-3


def test_statistics_and_weights_that_do_not_fit_are_refused():
    x, mask = torch.randn(1, 4, 6, 8), full_mask(1, 6, 6)
    lse = torch.zeros(1, 4, 6)
    with pytest.raises(ValueError, match="must broadcast"):
        relation_backward(x, x, None, None, lse, lse, torch.ones(5), mask=mask)
    with pytest.raises(ValueError, match="must be"):
        relation_backward(x, x, None, None, lse[..., :5], lse, mask=mask)
    with pytest.raises(ValueError, match="must be on cpu"):
        relation_backward(x, x, None, None, lse.to("meta"), lse, mask=mask)
