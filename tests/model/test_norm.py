"""The RMS norm against its definition."""

from __future__ import annotations

import pytest
import torch

from megalard.model.norm import RmsNorm


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_the_norm_is_its_definition(eps):
    torch.manual_seed(0)
    norm, x = RmsNorm(16, eps), torch.randn(3, 5, 16) * 3
    norm.weight.data.normal_()
    expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_a_bf16_input_is_averaged_in_fp32():
    """4096 squares of 1 + 1/128 summed in bf16 would stop at 256."""
    norm = RmsNorm(4096, 1e-6)
    norm.weight.data.fill_(1.0)
    x = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.ones_like(out))


def test_the_weight_is_not_trained():
    assert not RmsNorm(4, 1e-6).weight.requires_grad
