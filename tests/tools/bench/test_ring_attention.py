"""Ring attention, the reference of the attention benchmark, against one process."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import build_mesh
from tests.ranks import run_ranks
from tools.bench.agreement import check_agreement
from tools.bench.ring_attention import ring_attention


def _compare_with_one_process(kv_heads: int) -> None:
    mesh = build_mesh("cpu", 1, int(os.environ["WORLD_SIZE"]))
    shard = SequenceShard(48, mesh.cp)
    torch.manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    qkv = [torch.randn(2, h, 48, 8, requires_grad=True) for h in heads]
    upstream = torch.randn(2, 4, 48, 8)
    output = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    expected = [output, *torch.autograd.grad(output, qkv, upstream)]
    local = [shard.cut(x.detach(), 2).requires_grad_() for x in qkv]
    output = ring_attention(*local, mesh.cp)
    actual = [output, *torch.autograd.grad(output, local, shard.cut(upstream, 2))]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, shard.cut(theirs, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 4), (3, 4), (2, 2)])
def test_outputs_and_gradients_are_those_of_one_process(ranks, kv_heads):
    run_ranks(ranks, _compare_with_one_process, kv_heads)


def test_a_difference_beyond_rounding_fails():
    axis = SequenceShard(4).axis
    x = torch.ones(8)
    check_agreement([x], [x * 1.01], "close", axis)
    with pytest.raises(AssertionError, match="result 0 of far differs"):
        check_agreement([x], [x * 1.05], "far", axis)
