"""LoRA: W + (alpha / rank) B A, with dropout on the input of A (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import nn

from megalard.hashing import mixed


class DropoutKey:
    """The seed that all dropout masks of one step are drawn from.

    A mask is a hash of (seed, place in the model, token, feature). It is therefore the same however
    tokens and features are split over ranks, and a layer that is computed again under activation
    checkpointing draws the same mask.

    Attributes:
        seed: a number that changes from step to step.
    """

    def __init__(self):
        self.seed = 0


class Dropout(nn.Module):
    """Dropout at one place of the model, with masks drawn from a shared ``DropoutKey``."""

    def __init__(self, rate: float, place: int, key: DropoutKey):
        super().__init__()
        self.rate, self.place, self.key = rate, place, key

    def forward(
        self, x: torch.Tensor, token_t: torch.Tensor | None, *, first_row: int, first_feature: int
    ) -> torch.Tensor:
        """Set random entries of ``x`` to zero and scale the others by 1 / (1 - rate).

        Args:
            x: [rows, features], a rectangle of the whole input of the projection.
            token_t: int64 [t], one number per token of the micro-batch, unique within the step.
                None switches dropout off.
            first_row, first_feature: where the rectangle begins in the whole input.
        """
        if self.rate == 0 or token_t is None:
            return x
        token = token_t[first_row : first_row + x.shape[0]]
        seed = (self.key.seed * 1_000_003 + self.place) & 0x7FFFFFFF
        return _HashDropout.apply(x, self.rate, seed, token, first_feature)


class _HashDropout(torch.autograd.Function):
    """Dropout whose mask is computed again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx, x, rate, seed, token, first_feature):
        ctx.args = (rate, seed, first_feature)
        ctx.save_for_backward(token)
        return _masked(x, token, *ctx.args)

    @staticmethod
    def backward(ctx, grad):
        (token,) = ctx.saved_tensors
        return _masked(grad, token, *ctx.args), None, None, None, None


def _masked(x, token, rate, seed, first_feature):
    feature = torch.arange(first_feature, first_feature + x.shape[1], device=x.device)
    bits = mixed((token * 0x9E3779B1 + seed) & 0xFFFFFFFF)[:, None] ^ mixed(feature + 1)[None, :]
    keep = mixed(bits) >= int(rate * 2**32)
    return x * keep * (1.0 / (1.0 - rate))


def initial_a(rank: int, features: int, seed: int) -> torch.Tensor:
    """Return the initial A, fp32 [rank, features], Kaiming-uniform as in PEFT; B starts at zero.

    The values are drawn on the CPU from ``seed`` alone, so that every rank cuts its slice from the
    same matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(features)
    return torch.empty(rank, features).uniform_(-bound, bound, generator=generator)
