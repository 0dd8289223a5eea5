"""Cases that several test files share: shapes, tolerances with their reasons, and the checks."""

import pytest
import torch

from megalard.kernels.relation_kl import relation_backward, relation_forward, relation_kl
from tests.kernels.oracle import Case, make_problem, relative_error

HAS_CUDA = torch.cuda.is_available()
needs_interpreter = pytest.mark.skipif(HAS_CUDA, reason="CPU tensors need the interpreter")
both_backends = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=needs_interpreter)]
)
# Masked lanes hold inf - inf before they are dropped; the interpreter warns, a GPU does not.
ignore_masked_lanes = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton.runtime.interpreter"
)

# Absolute error of values in nats. Operands of every dtype are multiplied exactly and summed in
# fp32, so it is the fp32 rounding of scores of about 30 (2e-6 each), which grows slowly with the
# number of columns.
VALUE_ATOL = 2e-5
# Relative L2 error of gradients. fp32: the rounding of exp(S - lse), about |S| eps = 4e-6. bf16 and
# fp16: the stored gradient keeps 8 and 11 bits (rms 1.7e-3 and 2e-4); on tensor cores D is rounded
# in the same way once more, which makes 2.4e-3 and 3e-4 together.
GRAD_RTOL = {torch.float32: 2e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}

bf16, fp16 = torch.bfloat16, torch.float16
CASES = [
    Case(1, 16, 16),
    Case(2, 8, 16, layout="left_pad"),
    Case(15, 1, 3, layout="packed"),
    Case(16, 16, 16, causal=False),
    Case(17, 80, 64, layout="right_pad", scale_s=0.3, scale_t=0.05),
    Case(63, 64, 64, layout="packed_pad", causal=False),
    Case(65, 64, 128, b=1, layout="left_pad"),
    Case(65, 256, 16, b=1, heads=1),
    Case(130, 96, 112, b=1, layout="packed_pad"),
    Case(130, 32, 32, b=1, layout="left_pad"),
    Case(40, 16, 16, layout="all_pad"),
    Case(33, 16, 32, heads=4, cols_heads=2),
    Case(33, 16, 16, m=50, b=1, heads=6, cols_heads=2, row_offset=17, layout="packed"),
    Case(50, 16, 16, m=20, heads=2, cols_heads=1, row_offset=5, layout="both_pad", causal=False),
    Case(20, 32, 16, m=61, cols_heads=2, causal=False),
    Case(32, 16, 16, m=32, cols_heads=2, col_offset=32),  # every column is in the future
    Case(48, 16, 16, m=48, cols_heads=1, row_offset=48, layout="packed_pad"),
    Case(65, 64, 64, b=1, dtype=bf16, layout="packed"),
    Case(65, 64, 64, b=1, dtype=fp16, layout="packed"),
    Case(37, 80, 16, m=45, heads=4, cols_heads=2, row_offset=9, dtype=bf16),
    Case(37, 80, 16, m=45, heads=4, cols_heads=2, row_offset=9, dtype=fp16),
]
SELF = Case(50, 16, 16, layout="packed_pad")
PAIR = Case(40, 16, 16, m=60, b=1, heads=4, cols_heads=2)
SMALL = [SELF, PAIR]
MANY_BLOCKS = [
    Case(70, 16, 32, b=1, layout="single"),
    Case(70, 16, 16, b=1, causal=False, layout="packed"),
]


def case_params(cases):
    """Parametrize a test over cases, with their descriptions as ids."""
    return pytest.mark.parametrize("case", cases, ids=str)


def check_case(case, backend, device="cpu", bshd=False):
    """Compare values, statistics and gradients under a random row weight with float64."""
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
    wanted = zip(grads, problem.grads, leaves, problem.unpaired, strict=True)
    for grad, expected, leaf, unpaired in wanted:
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert grad.isfinite().all()
        # The gradient of a row with one column is 0, up to the rounding of exp(S - lse).
        assert relative_error(grad, expected, floor=0.1) < GRAD_RTOL[case.dtype]
        assert not grad.cpu().masked_fill(~unpaired[..., None], 0.0).any()


def check_backward_options(case, backend, rtol, device="cpu"):
    """Check every kind of row weight: none, one expanded number, strided; and fp32 gradients."""
    problem = make_problem(case, device)
    stats = relation_forward(*problem.operands, mask=problem.mask, backend=backend)

    def backward(weight, **options):
        grads = relation_backward(
            *problem.operands, stats.lse_s, stats.lse_t, weight,
            mask=problem.mask, backend=backend, **options,
        )  # fmt: skip
        return [grads] if torch.is_tensor(grads) else list(grads)

    in_fp32 = {"out_dtype": torch.float32}
    for grad, expected in zip(backward(problem.row_weight, **in_fp32), problem.grads, strict=True):
        assert grad.dtype == torch.float32 and relative_error(grad, expected) < rtol
    of_ones = backward(torch.ones(case.n, device=device), **in_fp32)
    exact = make_problem(case, device, weight_of_rows=1.0).grads
    for grad, expected in zip(of_ones, exact, strict=True):
        assert relative_error(grad, expected) < rtol
    # A weight of 1e-6 would vanish in fp16 if D were rounded as it stands.
    small = torch.full((case.b, case.heads, case.n), 1e-6, device=device)
    expanded = small[:1, :1, :1].as_strided(small.shape, (0, 0, 0))
    strided = small.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for weight, scale in ((None, 1.0), (small, 1e-6), (expanded, 1e-6), (strided, 1e-6)):
        for grad, of_one in zip(backward(weight, **in_fp32), of_ones, strict=True):
            # The same products, scaled in another place: fp32 rounding.
            assert relative_error(grad, of_one.double().cpu() * scale) < 1e-5
    assert all(not grad.any() for grad in backward(torch.zeros(case.n, device=device)))
    assert backward(None)[0].dtype == case.dtype


def poison_allocations(monkeypatch):
    """Fill everything that ``torch.empty`` and ``torch.empty_like`` allocate with NaN."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
