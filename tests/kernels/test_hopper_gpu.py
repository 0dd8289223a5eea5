"""The Hopper kernels on a Hopper GPU, against plain Triton and dense float64."""

from functools import reduce

import pytest
import torch

from megalard.kernels.relation_kl import (
    IntervalMask,
    finish,
    full_mask,
    merge,
    relation_forward,
    relation_partials,
)
from megalard.kernels.relation_kl.backends import choose, hopper, triton
from megalard.kernels.relation_kl.operands import check_operands
from tests.kernels.cases import VALUE_ATOL, poison_allocations
from tests.kernels.oracle import Case, make_problem, relative_error

hopper_backward = pytest.importorskip("megalard.kernels.relation_kl.hopper.backward")
pytestmark = pytest.mark.gpu


def hopper_relation(case: Case):
    """Return a problem and its operands, which the Hopper kernels must serve."""
    reason = hopper.why_not_on(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(reason)
    problem = make_problem(case, "cuda")
    op = check_operands(*problem.operands, problem.mask, None, None)
    for backward in (False, True):
        assert choose(op, None, backward=backward) is hopper
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
@pytest.mark.parametrize("shared_from", [0, 1 << 20], ids=["shared", "per head"])
def test_every_element_is_written_twice_alike_and_as_near_to_float64_as_plain_triton(
    case, shared_from, monkeypatch
):
    """All allocations are poisoned with NaN. Heads of a group share a buffer, or have one each."""
    problem, op = hopper_relation(case)
    monkeypatch.setattr(hopper_backward, "SHARED_BUFFER_FROM_COLUMNS", shared_from)
    weight = problem.row_weight
    plain = triton.forward(op, partial=False)
    plain_grads = triton.backward(op, *plain[:2], weight, torch.float32)
    poison_allocations(monkeypatch)
    runs = []
    for _ in range(2):
        stats = hopper.forward(op, partial=False)
        runs.append((*stats, *hopper.backward(op, *stats[:2], weight, torch.float32)))
    monkeypatch.undo()
    for x, again in zip(*runs, strict=True):
        assert x is again or torch.equal(x, again)  # None for the columns of a self relation
    # The two sum in different orders, so they differ by fp32 rounding, as ``VALUE_ATOL`` says.
    for x, y in zip(runs[0][:3], plain, strict=True):
        torch.testing.assert_close(x, y, atol=VALUE_ATOL, rtol=1e-5)
    for x, y, exact in zip(runs[0][3:], plain_grads, problem.grads, strict=False):
        error = relative_error(x, exact, floor=0.1)
        assert error < 1.1 * relative_error(y, exact, floor=0.1) + 1e-5


@pytest.mark.parametrize("layout", ["single", "packed_pad"])
def test_partials_over_column_splits_merge_to_the_entire_row(layout):
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
        torch.testing.assert_close(x.cpu().double(), expected, atol=VALUE_ATOL, rtol=1e-5)


def test_blocks_are_swept_again_where_scores_grow_along_the_row():
    """Late scores exceed the first ones by hundreds, which is more than a fixed shift can hold."""
    problem, _ = hopper_relation(Case(1500, 128, 128, b=1, dtype=torch.bfloat16))
    growth = torch.linspace(0.1, 8, 1500, device="cuda", dtype=torch.bfloat16)[:, None]
    # Every row sees all columns: in a causal relation the last score of a row is its largest.
    rows = [x * growth.flip(0) for x in (problem.student[0], problem.teacher[0])]
    cols = [x * growth for x in (problem.student[0], problem.teacher[0])]
    mask = full_mask(1, 1500, 1500, "cuda")
    stats = relation_forward(*rows, *cols, mask=mask)
    exact = relation_forward(*(x.double() for x in (*rows, *cols)), mask=mask)
    largest = exact.lse_s.abs().max().item()
    assert largest > 100
    # A score is 8 sums of 16 terms, added by tensor cores that cut each result at 2^-22 of it. An
    # error of t_j moves the KL by p_j |t_j - s_j - KL| times itself, errors of all s_j by 2 times.
    s, t = (x.double() @ y.double().mT / 128**0.5 for x, y in zip(rows, cols, strict=True))
    score_error = 8 * 2.0**-22 * max(s.abs().max().item(), t.abs().max().item())
    gap = (t - exact.lse_t[..., None]) - (s - exact.lse_s[..., None])
    moves = 2 + (torch.softmax(t, -1) * (gap - exact.kl[..., None]).abs()).sum(-1)
    for x, expected in zip(stats[:2], exact[:2], strict=True):
        torch.testing.assert_close(x.double(), expected, atol=score_error, rtol=0)
    assert ((stats.kl - exact.kl).abs() <= score_error * moves).all()
