"""Losses on the next-token distribution: logits exist for a few rows at a time, without a trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalard.distill.terms import logits
from tests.logits import load
from tests.models import make_model

ROWS, TOKENS = 5, 23


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    decoder = load(make_model("llama", tmp_path_factory.mktemp("chunks") / "model"))
    decoder.head_weight.requires_grad_()
    return decoder


@pytest.mark.parametrize("loss", ["cross-entropy", "kl"])
def test_no_more_rows_of_logits_than_a_chunk_exist_at_once(loss, decoder, monkeypatch):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, 32)
    other = torch.randn(TOKENS, 32)
    target = torch.randint(-1, 67, (1, TOKENS))
    seen, linear = [], F.linear

    def noted(x, *rest):
        seen.append(x.shape[0])
        return linear(x, *rest)

    monkeypatch.setattr(F, "linear", noted)
    results = []
    for rows in (1024, ROWS):
        monkeypatch.setattr(logits, "_ROWS", rows)
        seen.clear()
        leaf = hidden.clone().requires_grad_()
        decoder.head_weight.grad = None
        if loss == "kl":
            chosen = torch.arange(1, TOKENS)
            total = logits.logits_kl_sum(decoder, decoder, other, leaf, chosen)
        else:
            total = logits.cross_entropy_sum(decoder, leaf, target)
        total.backward()
        results.append((total.detach(), leaf.grad, decoder.head_weight.grad))
        assert max(seen) <= rows
    for whole, chunked in zip(*results, strict=True):
        # the order of a sum of 23 terms
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_torchs(decoder):
    torch.manual_seed(1)
    hidden, target = torch.randn(TOKENS, 32), torch.randint(-1, 67, (1, TOKENS))
    found = []
    for ours in (True, False):
        leaf = hidden.clone().requires_grad_()
        if ours:
            total = logits.cross_entropy_sum(decoder, leaf, target)
        else:
            scores = F.linear(decoder.model.norm(leaf), decoder.head_weight)
            total = F.cross_entropy(scores, target[0], ignore_index=-1, reduction="sum")
        total.backward()
        found.append((total.detach(), leaf.grad))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
