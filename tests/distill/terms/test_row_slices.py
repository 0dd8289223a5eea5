"""Sums in slices of rows: the same value and gradient, and few rows of logits at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalard.distill.terms import row_slices
from megalard.distill.terms.language_modelling import cross_entropy_sum
from megalard.distill.terms.logits_kl import logits_kl_sum
from megalard.distill.terms.row_slices import sum_of_row_slices
from tests.logits import load
from tests.models import make_model

ROWS, TOKENS = 5, 23


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A decoder whose head is trained."""
    decoder = load(make_model("llama", tmp_path_factory.mktemp("slices") / "model"))
    decoder.head_weight.requires_grad_()
    return decoder


def test_a_sum_of_row_slices_is_the_sum_over_all_rows(monkeypatch):
    monkeypatch.setattr(row_slices, "ROWS", 4)
    torch.manual_seed(0)
    x, target, weight = torch.randn(11, 3), torch.randn(11), torch.randn(3)
    sizes = []

    def slice_sum(x, target, weight):
        sizes.append(len(x))
        return ((x @ weight - target) ** 2).sum()

    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    total = sum_of_row_slices(slice_sum, (leaves[0], target), (leaves[1],))
    assert sizes == [4, 4, 3]
    total.backward()
    assert sizes == [4, 4, 3, 3, 4, 4], "the backward pass computes each slice again"
    plain = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = ((plain[0] @ plain[1] - target) ** 2).sum()
    expected.backward()
    torch.testing.assert_close(total, expected)
    for actual, wanted in zip(leaves, plain, strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad)


def test_gradients_of_weights_are_added_up_in_fp32(monkeypatch):
    """The gradient is a sum of 300 ones, which would be 256 in bf16."""
    monkeypatch.setattr(row_slices, "ROWS", 1)
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    x = torch.ones(300, 1, dtype=torch.bfloat16)
    sum_of_row_slices(lambda x, weight: (x * weight).float().sum(), (x,), (weight,)).backward()
    assert weight.grad.dtype == torch.bfloat16 and weight.grad.item() == 300


@pytest.mark.parametrize("loss", ["cross-entropy", "kl"])
def test_no_more_rows_of_logits_than_a_slice_exist_at_once(loss, decoder, monkeypatch):
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, TOKENS, 32)
    target = torch.randint(-1, 67, (1, TOKENS))
    rows_of_products, linear = [], F.linear

    def noting_linear(x, *rest):
        rows_of_products.append(x.shape[0])
        return linear(x, *rest)

    monkeypatch.setattr(F, "linear", noting_linear)
    results = []
    for rows in (1024, ROWS):
        monkeypatch.setattr(row_slices, "ROWS", rows)
        rows_of_products.clear()
        leaf = hidden.clone().requires_grad_()
        decoder.head_weight.grad = None
        if loss == "kl":
            compared = torch.arange(1, TOKENS)
            total = logits_kl_sum(decoder, decoder, teacher_hidden, leaf, compared)
        else:
            total = cross_entropy_sum(decoder, leaf, target)
        total.backward()
        results.append((total.detach(), leaf.grad, decoder.head_weight.grad))
        assert max(rows_of_products) <= rows
    for complete, sliced in zip(*results, strict=True):
        # A sum of 23 terms in another order.
        torch.testing.assert_close(sliced, complete, rtol=1e-5, atol=1e-6)
