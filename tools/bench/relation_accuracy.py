"""The accuracy of the relation's kernels against dense float64."""

from __future__ import annotations

import torch
from torch import Tensor

from megalard.kernels.relation_kl import causal_mask, relation_backward, relation_forward
from tools.bench.results import Table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCH, _HEADS = 1, 4


def measure_accuracy(head_dims: list[int], tokens: int, device: torch.device) -> list[dict]:
    """Measure and print the errors of a causal self relation on unit-normal vectors.

    Returns:
        For each dtype and head dimension the largest error of a row's KL in nats, and the relative
        L2 error of the gradient as it was accumulated (fp32) and as stored in the operands' dtype.
    """
    print(f"\nerrors against dense float64: {_BATCH} x {_HEADS} heads, {tokens} tokens, causal")
    table = Table("dtype", "head_dim", "max |KL error|", "gradient, fp32", "gradient, stored")
    rows, mask = [], causal_mask(_BATCH, tokens, device)
    for name, dtype in DTYPES.items():
        for head_dim in head_dims:
            torch.manual_seed(0)
            shape = (_BATCH, _HEADS, tokens, head_dim)
            x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            kl, gradient = dense_relation(x, y)
            rows_statistics = relation_forward(x, y, mask=mask)
            errors = [float((rows_statistics.kl - kl).abs().max())]
            for out_dtype in (torch.float32, dtype):
                lse = (rows_statistics.lse_s, rows_statistics.lse_t)
                result = relation_backward(x, y, None, None, *lse, mask=mask, out_dtype=out_dtype)
                errors.append(float((result - gradient).norm() / gradient.norm()))
            keys = ("kl_max_error", "gradient_error_fp32", "gradient_error_stored")
            rows.append(
                {"dtype": name, "head_dim": head_dim, **dict(zip(keys, errors, strict=True))}
            )
            table.row(name, head_dim, *(f"{error:.1e}" for error in errors))
    return rows


def dense_relation(x_bhnd: Tensor, y_bhnd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL [b, H, n] of a causal self relation and the gradient of its sum, in float64.

    Args:
        x_bhnd: the student's vectors.
        y_bhnd: the teacher's vectors.
    """
    x, y = x_bhnd.double().requires_grad_(), y_bhnd.double()
    n, d = x.shape[2:]
    is_hidden = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
    scores = (z @ z.mT * d**-0.5 for z in (x, y))
    logp_s, logp_t = (
        s.masked_fill(is_hidden, -torch.inf).log_softmax(-1).masked_fill(is_hidden, 0)
        for s in scores
    )
    # A hidden pair has the logarithm 0 twice, and so adds 1 * (0 - 0).
    kl = (logp_t.exp() * (logp_t - logp_s)).sum(-1)
    return kl.detach(), torch.autograd.grad(kl.sum(), x)[0]
