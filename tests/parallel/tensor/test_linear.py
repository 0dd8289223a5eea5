"""Linear layers over the tp axis against plain torch in one process: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalard.model.lora import Dropout, DropoutKey
from megalard.model.projection import Projection
from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.parallel.tensor.linear import (
    column_parallel,
    row_parallel,
    vocab_parallel_embedding,
)
from tests.ranks import run_ranks

TOKENS, FEATURES, OUT, RANK, SCALE = 8, 12, 8, 3, 1.5


def random(*shape: int) -> torch.Tensor:
    """Return a random tensor, the same on every rank for one shape."""
    generator = torch.Generator().manual_seed(sum(shape) * 31 + shape[0])
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def projection(weight: torch.Tensor, bias, lora_a, lora_b, dropout: float = 0.0) -> Projection:
    """Return a projection whose parameters are given and differentiable."""
    result = Projection(weight.shape[1], weight.shape[0], bias is not None)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(result, name, torch.nn.Parameter(value.clone()))
    result.lora_A = torch.nn.Parameter(lora_a.clone())
    result.lora_B = torch.nn.Parameter(lora_b.clone())
    result.lora_scale, result.lora_dropout = SCALE, Dropout(dropout, 0, DropoutKey())
    return result


def plain(x, weight, bias, lora_a, lora_b):
    """Return x Wᵀ + b + scale (x Aᵀ) Bᵀ."""
    return F.linear(x, weight, bias) + SCALE * F.linear(F.linear(x, lora_a), lora_b)


def assert_gradients(function, leaves, upstream, expected_out, expected_grads) -> None:
    out = function()
    torch.testing.assert_close(out, expected_out)
    grads = torch.autograd.grad(out, leaves, upstream)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected)


def expected(x, parameters, upstream):
    """Return value and gradients of the plain layer."""
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    out = plain(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_single_rank_computes_the_plain_layer(kind):
    x, upstream = random(TOKENS, FEATURES), random(TOKENS, OUT)
    parameters = random(OUT, FEATURES), random(OUT), random(RANK, FEATURES), random(OUT, RANK)
    out, grads = expected(x, parameters, upstream)
    p, leaf = projection(*parameters), x.clone().requires_grad_()

    def compute():
        if kind == "row":
            return row_parallel(leaf, p, SINGLE, None)
        return column_parallel(leaf, (p,), SINGLE, None)[0]

    assert_gradients(compute, [leaf, p.weight, p.bias, p.lora_A, p.lora_B], upstream, out, grads)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_dropout_is_of_the_input_of_a_alone(kind):
    """As in peft: x Wᵀ + b + scale (dropout(x) Aᵀ) Bᵀ, with its gradients."""
    x, upstream, token_t = random(TOKENS, FEATURES), random(TOKENS, OUT), torch.arange(TOKENS)
    parameters = random(OUT, FEATURES), random(OUT), random(RANK, FEATURES), random(OUT, RANK)
    p, leaf = projection(*parameters, dropout=0.5), x.clone().requires_grad_()
    # 0 for what is dropped and 2 for the others; tests/model/test_lora.py holds it to the rate.
    factor = p.lora_dropout(torch.ones_like(x), token_t, first_row=0, first_feature=0)
    assert factor.unique().tolist() == [0, 2]
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    plain_x, weight, bias, a, b = leaves
    out = F.linear(plain_x, weight, bias) + SCALE * (plain_x * factor) @ a.T @ b.T
    grads = torch.autograd.grad(out, leaves, upstream)

    def compute():
        if kind == "row":
            return row_parallel(leaf, p, SINGLE, token_t)
        return column_parallel(leaf, (p,), SINGLE, token_t)[0]

    ours = [leaf, p.weight, p.bias, p.lora_A, p.lora_B]
    assert_gradients(compute, ours, upstream, out.detach(), grads)


def _on_two_ranks() -> None:
    axis = build_mesh("cpu", 2).tp
    tokens = slice(axis.rank * TOKENS // 2, (axis.rank + 1) * TOKENS // 2)
    rows = slice(axis.rank * OUT // 2, (axis.rank + 1) * OUT // 2)
    features = slice(axis.rank * FEATURES // 2, (axis.rank + 1) * FEATURES // 2)
    x, upstream = random(TOKENS, FEATURES), random(TOKENS, OUT)
    weight, bias, a, b = parameters = (
        random(OUT, FEATURES),
        random(OUT),
        random(RANK, FEATURES),
        random(OUT, RANK),
    )
    out, (dx, dw, db, da, dlora_b) = expected(x, parameters, upstream)

    # Tokens are split before a column-parallel layer, and outputs after it. A is on both ranks, and
    # each of them sees its own tokens: the sum over ranks is the gradient.
    p, leaf = projection(weight[rows], bias[rows], a, b[rows]), x[tokens].clone().requires_grad_()
    (y,) = column_parallel(leaf, (p,), axis, None)
    torch.testing.assert_close(y, out[:, rows])
    leaves = [leaf, p.weight, p.bias, p.lora_A, p.lora_B]
    grads = torch.autograd.grad(y, leaves, upstream[:, rows])
    torch.distributed.all_reduce(grads[3])
    for grad, want in zip(grads, (dx[tokens], dw[rows], db[rows], da, dlora_b[rows]), strict=True):
        torch.testing.assert_close(grad, want)

    # Features are split before a row-parallel layer, and tokens after it.
    p = projection(weight[:, features], bias, a[:, features], b)
    leaf = x[:, features].clone().requires_grad_()
    y = row_parallel(leaf, p, axis, None)
    torch.testing.assert_close(y, out[tokens])
    leaves = [leaf, p.weight, p.bias, p.lora_A, p.lora_B]
    grads = torch.autograd.grad(y, leaves, upstream[tokens])
    for grad in (grads[2], grads[4]):  # the bias and B are on both ranks
        torch.distributed.all_reduce(grad)
    wanted = (dx[:, features], dw[:, features], db, da[:, features], dlora_b)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)

    _check_dropout(axis, x, tokens, rows, features)
    _check_embedding(axis)


def _check_dropout(axis, x, tokens, rows, features) -> None:
    """Two ranks draw the masks of one, before column- and row-parallel layers."""
    token_t = torch.arange(100, 100 + TOKENS)
    zero, a, b = torch.zeros(OUT, FEATURES).double(), random(RANK, FEATURES), random(OUT, RANK)
    full = projection(zero, None, a, b, 0.5)
    (single,) = column_parallel(x, (full,), SINGLE, token_t)
    assert not torch.allclose(single, plain(x, zero, None, a, b))
    p = projection(zero[rows], None, a, b[rows], 0.5)
    torch.testing.assert_close(column_parallel(x[tokens], (p,), axis, token_t)[0], single[:, rows])
    p = projection(zero[:, features], None, a[:, features], b, 0.5)
    torch.testing.assert_close(row_parallel(x[:, features], p, axis, token_t), single[tokens])


def _check_embedding(axis) -> None:
    """Every rank looks up the tokens of its rows; here rank 1 holds the last 2 of 7 rows."""
    table, ids = random(7, FEATURES), torch.tensor([0, 6, 4, 5, 1, 1, 2, 6])
    start = axis.rank * 5
    weight = table[start : start + 5].clone().requires_grad_()
    out = vocab_parallel_embedding(ids, weight, start, axis)
    tokens = slice(axis.rank * 4, axis.rank * 4 + 4)
    assert torch.equal(out, table[ids][tokens])
    upstream = random(8, FEATURES)
    out.backward(upstream[tokens])
    plain_table = table.clone().requires_grad_()
    F.embedding(ids, plain_table).backward(upstream)
    torch.testing.assert_close(weight.grad, plain_table.grad[start : start + 5])


def test_two_ranks_compute_the_plain_layers():
    run_ranks(2, _on_two_ranks)


def test_projections_of_one_input_share_its_dropout_mask():
    x, key = torch.randn(64, FEATURES, dtype=torch.float64), DropoutKey()
    zero, a, b = torch.zeros(OUT, FEATURES).double(), random(RANK, FEATURES), random(OUT, RANK)
    pair = [projection(zero, None, a, b) for _ in range(2)]
    for p in pair:
        p.lora_dropout = Dropout(0.5, 3, key)
    q, k = column_parallel(x, tuple(pair), SINGLE, torch.arange(64))
    torch.testing.assert_close(q, k)
    assert not torch.allclose(q, plain(x, zero, None, a, b))
