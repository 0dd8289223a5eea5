"""Chains of pointwise operations as one kernel each, through ``torch.compile``, on GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def fused_on_gpu(function: Callable) -> Callable:
    """Compile ``function`` for CUDA inputs, and call it as it is for CPU inputs.

    A machine without a GPU may have no compiler. On the 7B shape the unfused RoPE, SwiGLU and
    scaling of gradients took a tenth of a step. The compiler is imported with the first CUDA input,
    because the import takes seconds.
    """

    @functools.cache
    def compiled() -> Callable:
        return torch.compile(function)

    @functools.wraps(function)
    def call(first: torch.Tensor, *rest):
        return (compiled() if first.is_cuda else function)(first, *rest)

    return call
