"""Attention that is computed in two parts and merged, against dense float64 softmax."""

from __future__ import annotations

import math

import pytest
import torch

from megalard.model import attention
from megalard.model.merged_attention import (
    as_torch_has_them,
    attention_part,
    merge,
    merged_attention,
)
from tests.model.test_attention import WITHOUT_WINDOWS, check, is_hopper


def check_merged(device, dtype, tolerance, kind, heads, window, ranks, monkeypatch, scale=1):
    """Compare merged attention as ``check`` compares attention."""
    monkeypatch.setattr(
        attention, "attend", lambda q, k, v, spans, window: merged_attention(q, k, v, spans)
    )
    check(device, dtype, tolerance, kind, heads, window, ranks, scale)


@WITHOUT_WINDOWS
def test_attention_merged_from_two_parts_is_exact(kind, heads, window, ranks, monkeypatch):
    check_merged("cpu", torch.float32, 1e-5, kind, heads, window, ranks, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU, where torch prefers cuDNN")
@WITHOUT_WINDOWS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_merged_from_two_parts_is_exact_on_the_gpu(
    kind, heads, window, ranks, dtype, monkeypatch
):
    # As in test_attention_is_exact_on_the_gpu, with one more rounding of each part. There are no
    # single rows, which attend does not give to cuDNN.
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    check_merged("cuda", dtype, tolerance, kind, heads, window, ranks, monkeypatch, scale=32)


def test_merging_two_sets_of_keys_is_attention_over_their_union():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (3, 10, 10))
    first, second = (
        attention_part(q, k[:, :, keys], v[:, :, keys], False)
        for keys in (slice(0, 4), slice(4, 10))
    )
    out, lse = merge(*first, *second)
    scores = (q.double() @ k.double().mT) / math.sqrt(8)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        lse.double(), scores.logsumexp(-1, keepdim=True), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["heads-first", "tokens-first"])
@pytest.mark.parametrize("rows", [slice(None), slice(4, None)], ids=["all", "late"])
def test_gradient_and_output_have_the_strides_that_torch_gives_them(order, rows):
    """torch allocates the output like q, and the gradient comes from [b, s, h, d]."""
    shape = (2, 3, 8, 4)  # b, h, s, d
    tokens_first = torch.empty(2, 8, 3, 4).transpose(1, 2)

    def like(order):
        return torch.randn([shape[dim] for dim in order]).permute(order)[:, :, rows]

    q = like(order)
    for given in ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)):
        if given == (2, 0, 1, 3):
            grad, out = (torch.randn(8, 2, 3, 4).permute(1, 2, 0, 3)[:, :, rows] for _ in range(2))
        else:
            grad, out = like(given), like(given)
        new_grad, new_out = as_torch_has_them(grad, out, q)
        assert torch.equal(new_grad, grad) and torch.equal(new_out, out)
        assert new_grad.stride() == torch.empty_like(tokens_first[:, :, rows]).stride()
        assert new_out.stride() == torch.empty_like(q).stride()
