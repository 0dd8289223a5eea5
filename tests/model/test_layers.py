"""The layers against their definitions in plain torch, and both orders against transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, Olmo2Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer

from megalard.data.batch import collate
from megalard.model.layers import (
    LAYERS,
    FullWidthNorm,
    HeadNorm,
    Mlp,
    PostNormLayer,
    PreNormLayer,
    swiglu,
)
from megalard.model.ops import Context
from megalard.parallel.ops import ParallelOps
from tests.model.families.configs import BASE, spec_of

LENGTH = 7


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last dim."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def fill(module: torch.nn.Module) -> None:
    """Give a module random parameters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.5, 0.3)


def test_swiglu_is_silu_times_the_other_half():
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(swiglu(gate, up), gate * torch.sigmoid(gate) * up)


def test_the_mlp_is_down_of_swiglu_with_biases():
    mlp = Mlp(spec_of("llama", mlp_bias=True))
    fill(mlp)
    x = torch.randn(4, 32)
    gate = x @ mlp.gate_proj.weight.T + mlp.gate_proj.bias
    up = x @ mlp.up_proj.weight.T + mlp.up_proj.bias
    expected = F.linear(F.silu(gate) * up, mlp.down_proj.weight, mlp.down_proj.bias)
    torch.testing.assert_close(mlp(x, ParallelOps()), expected)


def test_a_norm_of_heads_takes_the_mean_of_each_head():
    norm, x = HeadNorm(head_dim=4, num_heads=3, eps=1e-3), torch.randn(5, 12)
    fill(norm)
    expected = torch.cat([rms(head, norm.weight, 1e-3) for head in x.split(4, -1)], -1)
    torch.testing.assert_close(norm.split(x, ParallelOps()), expected)


def test_a_norm_of_full_width_takes_the_mean_of_all_heads():
    norm, x = FullWidthNorm(head_dim=4, num_heads=3, eps=1e-3), torch.randn(5, 12)
    fill(norm)
    torch.testing.assert_close(norm.split(x, ParallelOps()), rms(x, norm.weight, 1e-3))


def test_norms_are_before_or_after_the_sublayers():
    assert {"before": PreNormLayer, "after": PostNormLayer} == LAYERS


@pytest.mark.parametrize(
    ("family", "theirs", "kind"),
    [
        ("llama", LlamaDecoderLayer, LlamaConfig),
        ("olmo2", Olmo2DecoderLayer, Olmo2Config),
    ],
)
def test_a_layer_computes_what_the_layer_of_transformers_computes(family, theirs, kind):
    config = kind(**BASE, _attn_implementation="eager", rms_norm_eps=1e-5)
    theirs = theirs(config, 0)
    fill(theirs)
    spec = spec_of(family, rms_norm_eps=1e-5)
    layer = LAYERS[spec.norms](spec, None)
    layer.load_state_dict(theirs.state_dict())
    x, angle = torch.randn(1, LENGTH, 32), torch.randn(1, 1, LENGTH, 4).repeat(1, 1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    batch = collate([(torch.arange(LENGTH).numpy(), [(0, LENGTH)])])
    context, ops = Context(cos, sin, batch), ParallelOps()
    attention_output = layer.attend(layer.qkv(x[0], context, ops), context, ops)
    actual = layer.rest(x[0], attention_output, ops)
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    expected = theirs(x, attention_mask=mask, position_embeddings=(cos[0], sin[0]))
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(actual, expected.reshape(LENGTH, 32), rtol=1e-4, atol=1e-5)
