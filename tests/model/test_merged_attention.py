"""Attention that is computed in two parts and merged, against dense float64 softmax."""

from __future__ import annotations

import math

import pytest
import torch

from megalard.model import attention
from megalard.model.merged_attention import attention_part, merge, merged_attention
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
