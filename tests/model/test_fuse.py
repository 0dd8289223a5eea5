"""Pointwise chains are compiled for CUDA inputs only."""

from __future__ import annotations

import pytest
import torch

from megalard.model import fuse


def test_cpu_inputs_need_no_compiler(monkeypatch):
    def compile_(function):
        def compiled(*arguments):
            raise AssertionError("the compiled function was called")

        return compiled

    monkeypatch.setattr(fuse.torch, "compile", compile_)

    @fuse.fused_on_gpu
    def double_sum(x, y):
        """Return 2 x + y."""
        return 2 * x + y

    assert double_sum(torch.tensor(3.0), torch.tensor(1.0)) == 7
    assert double_sum.__name__ == "double_sum" and double_sum.__doc__ == "Return 2 x + y."


@pytest.mark.gpu
def test_cuda_inputs_give_the_same_values():
    @fuse.fused_on_gpu
    def double_sum(x, y):
        return 2 * x + y

    x, y = torch.randn(2, 1000)
    torch.testing.assert_close(double_sum(x.cuda(), y.cuda()).cpu(), 2 * x + y)
