"""Relation KL on the CPU, in torch and in interpreted Triton, against a dense float64 oracle."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalard.kernels import relation_kl as package
from megalard.kernels.relation_kl import (
    Partials,
    causal_mask,
    finish,
    full_mask,
    merge,
    relation_backward,
    relation_forward,
    relation_kl,
    relation_partials,
    rescale,
)
from megalard.kernels.relation_kl import (
    torch_reference as reference,
)
from tests.kernels.oracle import Case, make_problem, relative_error

tiling = pytest.importorskip("megalard.kernels.relation_kl.triton.tiles")
# Masked lanes hold inf - inf before they are dropped; on a GPU that is silent.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HAS_CUDA = torch.cuda.is_available()
interpreted = pytest.param(
    "triton", marks=pytest.mark.skipif(HAS_CUDA, reason="CPU tensors need the interpreter")
)
both_backends = pytest.mark.parametrize("backend", ["torch", interpreted])

# Absolute error of values in nats: all dtypes are multiplied exactly and summed in fp32, so it is
# fp32 rounding of scores of about 30 (2e-6 each), growing slowly with the number of columns.
VALUE_ATOL = 2e-5
# Relative L2 error of gradients. fp32: rounding of exp(S - lse), about |S| eps = 4e-6. bf16 and
# fp16: the stored gradient keeps 8 and 11 bits (rms 1.7e-3 and 2e-4); on tensor cores D is rounded
# the same way once more, together 2.4e-3 and 3e-4.
GRAD_RTOL = {torch.float32: 2e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}

bf16, fp16 = torch.bfloat16, torch.float16
CASES = [
    Case(1, 16, 16),
    Case(2, 8, 16, layout="left_pad"),
    Case(15, 1, 3, layout="packed"),
    Case(16, 16, 16, causal=False),
    Case(17, 80, 64, layout="right_pad", scale_s=0.3, scale_t=0.05),
    Case(63, 64, 64, layout="packed_pad", causal=False),
    Case(65, 64, 128, layout="left_pad"),
    Case(65, 256, 16, b=1, heads=1),
    Case(130, 96, 112, b=1, layout="packed_pad"),
    Case(130, 32, 32, b=1, layout="left_pad"),
    Case(40, 16, 16, layout="all_pad"),
    Case(33, 16, 32, heads=4, cols_heads=2),
    Case(33, 16, 16, m=50, heads=6, cols_heads=2, row_offset=17, layout="packed"),
    Case(50, 16, 16, m=20, heads=2, cols_heads=1, row_offset=5, layout="both_pad", causal=False),
    Case(20, 32, 16, m=61, cols_heads=2, causal=False),
    Case(32, 16, 16, m=32, cols_heads=2, col_offset=32),  # columns all in the future: empty
    Case(48, 16, 16, m=48, cols_heads=1, row_offset=48, layout="packed_pad"),
    Case(65, 64, 64, b=1, dtype=bf16, layout="packed"),
    Case(65, 64, 64, b=1, dtype=fp16, layout="packed"),
    Case(37, 80, 16, m=45, heads=4, cols_heads=2, row_offset=9, dtype=bf16),
    Case(37, 80, 16, m=45, heads=4, cols_heads=2, row_offset=9, dtype=fp16),
]
SMALL = [Case(50, 16, 16, layout="packed_pad"), Case(40, 16, 16, m=60, heads=4, cols_heads=2)]
BLOCKS = [Case(90, 16, 32, b=1, layout="single"), Case(90, 16, 16, causal=False, layout="packed")]
TINY_TILES = dict.fromkeys(tiling.FORWARD_TILES, (16, 16, 4, 1))


def case_params(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def check_case(case, backend, device="cpu", bshd=False):
    """Values, statistics and student gradients under a random row weight."""
    problem = make_problem(case, device, bshd=bshd)
    leaves = [x.requires_grad_() for x in problem.student]
    options = dict(mask=problem.mask, scale_s=case.scale_s, scale_t=case.scale_t, backend=backend)
    kl = relation_kl(*problem.operands, **options)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.detach().cpu().double(), problem.kl, atol=VALUE_ATOL, rtol=1e-5)

    statistics = relation_forward(*problem.operands, **options)
    assert torch.equal(statistics.kl, kl)
    for actual, expected in (
        (statistics.lse_s, problem.lse_s),
        (statistics.lse_t, problem.lse_t),
    ):
        torch.testing.assert_close(actual.cpu().double(), expected, atol=VALUE_ATOL, rtol=1e-6)

    grads = torch.autograd.grad(kl, leaves, problem.row_weight)
    wanted = zip(grads, problem.grads, leaves, problem.untouched, strict=True)
    for grad, expected, leaf, untouched in wanted:
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert grad.isfinite().all()
        # A row with one column has the gradient 0, reached only up to the rounding of exp(S - lse).
        assert relative_error(grad, expected, floor=0.1) < GRAD_RTOL[case.dtype]
        assert not grad.cpu().masked_fill(~untouched[..., None], 0.0).any()


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of 16 x 16, so that short sequences run through full, edge and skipped tiles."""
    monkeypatch.setattr(tiling, "FORWARD_TILES", TINY_TILES)
    monkeypatch.setattr(tiling, "BACKWARD_TILES", TINY_TILES)
    monkeypatch.setattr(reference, "BLOCK_ROWS", 16)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1)


@pytest.mark.parametrize("shared_kilobytes", [99, 163, 227])
def test_tiles_fit_the_shared_memory_of_the_gpu(shared_kilobytes, monkeypatch):
    """Consumer Ampere and Ada, A100, H100 and later; no GPU is needed to choose."""
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_kilobytes << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    operand = SimpleNamespace(
        is_cuda=True, device=None, shape=(1, 1, 1, 128), element_size=lambda: 2
    )
    chosen = tiling.choose_tiles(tiling.BACKWARD_TILES, operand)
    large = shared_kilobytes > 200
    assert chosen == (tiling.BACKWARD_TILES if large else tiling.SMALL_TILES)[2, 128]


@pytest.mark.skipif(HAS_CUDA, reason="CPU tensors need the interpreter")
@case_params(SMALL)
def test_small_tiles_give_the_same(case, monkeypatch):
    monkeypatch.setattr(tiling, "FORWARD_TILES", tiling.SMALL_TILES)
    monkeypatch.setattr(tiling, "BACKWARD_TILES", tiling.SMALL_TILES)
    check_case(case, "triton")


@both_backends
@case_params(CASES)
def test_values_and_gradients_match_dense_float64(case, backend):
    check_case(case, backend)


@both_backends
@case_params([*BLOCKS, *SMALL])
def test_values_and_gradients_match_over_many_tiles(case, backend, tiny_tiles):
    check_case(case, backend)


@both_backends
@case_params([replace(SMALL[1], n=33), replace(SMALL[0], dtype=bf16)])
def test_transposed_inputs_need_no_copy(case, backend, monkeypatch):
    monkeypatch.setattr(package.op, "replace", None)  # the only place that copies operands
    check_case(case, backend, bshd=True)


@both_backends
def test_strided_last_dimension(backend):
    problem = make_problem(SMALL[0])
    rows_s, rows_t = (x.mT.contiguous().mT for x in (problem.student[0], problem.teacher[0]))
    assert rows_s.stride(3) != 1
    kl = relation_kl(rows_s, rows_t, mask=problem.mask, backend=backend)
    torch.testing.assert_close(kl.double(), problem.kl, atol=VALUE_ATOL, rtol=1e-5)


def check_backward_options(case, backend, rtol, device="cpu"):
    """No weight, one expanded weight, a strided weight, and fp32 gradients of fp16 operands."""
    problem = make_problem(case, device)
    stats = relation_forward(*problem.operands, mask=problem.mask, backend=backend)

    def backward(weight, **options):
        grads = relation_backward(
            *problem.operands, stats.lse_s, stats.lse_t, weight,
            mask=problem.mask, backend=backend, **options,
        )  # fmt: skip
        return [grads] if torch.is_tensor(grads) else list(grads)

    fine = {"out_dtype": torch.float32}
    for grad, expected in zip(backward(problem.row_weight, **fine), problem.grads, strict=True):
        assert grad.dtype == torch.float32 and relative_error(grad, expected) < rtol
    ones = backward(torch.ones(case.n, device=device), **fine)
    # 1e-6 per row would vanish in fp16 if D were rounded as it stands.
    small = torch.full((case.b, case.heads, case.n), 1e-6, device=device)
    expanded = small[:1, :1, :1].as_strided(small.shape, (0, 0, 0))
    strided = small.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for weight, scale in ((None, 1.0), (small, 1e-6), (expanded, 1e-6), (strided, 1e-6)):
        for grad, one in zip(backward(weight, **fine), ones, strict=True):
            assert relative_error(grad, one.double().cpu() * scale) < 1e-5
    assert all(not grad.any() for grad in backward(torch.zeros(case.n, device=device)))
    assert backward(None)[0].dtype == case.dtype


@both_backends
@case_params(SMALL)
def test_backward_options(case, backend):
    check_backward_options(replace(case, dtype=fp16), backend, rtol=2e-5)


@both_backends
def test_gradient_reaches_the_student_only(backend):
    problem = make_problem(SMALL[1])
    for x in (*problem.student, *problem.teacher):
        x.requires_grad_()
    kl = relation_kl(*problem.operands, mask=problem.mask, backend=backend)
    kl.mean().backward()
    assert all(x.grad is not None for x in problem.student)
    assert all(x.grad is None for x in problem.teacher)


@both_backends
@case_params(
    [SMALL[0], Case(50, 16, 16, b=1, layout="single"), Case(50, 16, 16, b=1, causal=False)]
)
def test_partials_over_column_splits_merge_to_the_whole(case, backend, tiny_tiles):
    """The columns of a self relation cut in four, and the gradients of the parts summed."""
    problem = make_problem(case)
    (rows_s,), (rows_t,) = problem.student, problem.teacher
    mask, cuts = problem.mask, [0, 7, 8, 31, case.n]
    parts, chunks = [], []
    for start, stop in pairwise(cuts):
        m = stop - start
        chunk = package.IntervalMask(
            (mask.col_lo_bn - start).clamp(0, m),
            (mask.col_hi_bn - start).clamp(0, m),
            mask.row_lo_bm[:, start:stop],
            mask.row_hi_bm[:, start:stop],
        )
        operands = (rows_s, rows_t, rows_s[:, :, start:stop], rows_t[:, :, start:stop])
        chunks.append((operands, chunk, slice(start, stop)))
        parts.append(relation_partials(*operands, mask=chunk, backend=backend))

    whole = parts[0]
    for part in parts[1:]:
        whole = merge(whole, part)
    m_s = torch.stack([part.m_s for part in parts]).amax(0)
    m_t = torch.stack([part.m_t for part in parts]).amax(0)
    sums = [torch.stack(x).sum(0) for x in zip(*(rescale(p, m_s, m_t) for p in parts), strict=True)]
    reduced = Partials(m_s, sums[1], m_t, sums[3], sums[4])
    for partials in (whole, reduced):
        lse_s, lse_t, kl = finish(partials)
        for actual, expected in ((lse_s, problem.lse_s), (lse_t, problem.lse_t), (kl, problem.kl)):
            torch.testing.assert_close(actual.double(), expected, atol=VALUE_ATOL, rtol=1e-5)

    total = torch.zeros_like(rows_s)
    for operands, chunk, columns in chunks:
        grad_rows, grad_cols = relation_backward(
            *operands, lse_s, lse_t, problem.row_weight,
            mask=chunk, backend=backend, out_dtype=torch.float32,
        )  # fmt: skip
        total += grad_rows
        total[:, :, columns] += grad_cols
    assert relative_error(total, problem.grads[0]) < GRAD_RTOL[torch.float32]


def test_empty_partials_merge_without_nan():
    empty = Partials(*(torch.full((1, 1, 3), x) for x in (-torch.inf, 0.0, -torch.inf, 0.0, 0.0)))
    lse_s, lse_t, kl = finish(merge(empty, empty))
    assert (
        torch.equal(kl, torch.zeros(1, 1, 3)) and lse_s.isneginf().all() and lse_t.isneginf().all()
    )
    some = Partials(*(torch.full((1, 1, 3), x) for x in (2.0, 1.5, 3.0, 1.25, 0.5)))
    for merged in (merge(empty, some), merge(some, empty)):
        assert all(torch.equal(x, y) for x, y in zip(merged, some, strict=True))


@both_backends
@case_params([SMALL[0], SMALL[1]])
def test_every_output_element_is_written(case, backend, monkeypatch):
    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    check_case(case, backend)


@both_backends
@case_params(SMALL)
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
    problem = make_problem(SMALL[0])
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
    # Scores of about 1e3 carry absolute fp32 rounding of about 1e-4.
    torch.testing.assert_close(kl.detach().double(), problem.kl, atol=1e-3, rtol=1e-5)
    grads = torch.autograd.grad(kl, leaves, problem.row_weight)
    assert relative_error(grads[0], problem.grads[0]) < 1e-3


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_is_quadratic_in_the_sequence(monkeypatch):
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1 << 15)
    n, d = 2048, 8
    rows = torch.randn(1, 1, n, d)
    mask = causal_mask(1, n)
    with LargestTensor() as largest:
        stats = relation_forward(rows, 2 * rows, mask=mask)
        relation_backward(rows, 2 * rows, None, None, stats.lse_s, stats.lse_t, mask=mask)
    assert largest.numel <= 1 << 15


def test_float64_is_served_by_torch():
    problem = make_problem(SMALL[1])
    operands = [x.double() for x in problem.operands]
    options = dict(mask=problem.mask)
    stats = relation_forward(*operands, **options)
    torch.testing.assert_close(stats.kl, problem.kl, atol=1e-13, rtol=1e-12)
    grads = relation_backward(*operands, *stats[:2], problem.row_weight, **options)
    assert max(map(relative_error, grads, problem.grads)) < 1e-13


def test_bad_arguments_are_refused():
    x = torch.randn(1, 4, 6, 8)
    mask = full_mask(1, 6, 6)

    def refused(match, *operands, **options):
        with pytest.raises(ValueError, match=match):
            relation_kl(*operands, **{"mask": mask, **options})

    refused("multiple", x, x, x[:, :3], x[:, :3])
    refused("differ in head_dim", x, x, x[..., :4], x)
    refused("both be given", x, x, x)
    refused("above 256", torch.randn(1, 1, 6, 257), x[:, :1])
    refused("teacher rows differ", x, x[:, :2])
    refused("the mask is for", x, x, mask=full_mask(1, 6, 5))
    refused("student rows are", x, x, x.half(), x)
    refused("floating point", x.long(), x)
    refused("is on meta", x, x.to("meta"))
    refused("positive", x, x, scale_s=-1.0)
    refused("backend must be", x, x, backend="cuda")
    refused("no float64", x.double(), x.double(), backend="triton")
    with pytest.raises(ValueError, match="must broadcast"):
        lse = torch.zeros(1, 4, 6)
        relation_backward(x, x, None, None, lse, lse, torch.ones(5), mask=mask)
    with pytest.raises(ValueError, match="must be"):
        relation_backward(x, x, None, None, lse[..., :5], lse, mask=mask)
    with pytest.raises(ValueError, match="must be on cpu"):
        relation_backward(x, x, None, None, lse.to("meta"), lse, mask=mask)
