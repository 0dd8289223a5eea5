"""What a decoder needs from outside: its input, and operations that depend on the split over ranks.

Shapes: b sequences of s tokens are t = b * s rows. With tensor parallelism the residual stream is
[t/tp, hidden], and attention sees all tokens of this rank's heads. Where tp does not divide t, t/tp
is rounded up: the last ranks have rows of padding, which stand after the t tokens when the rows of
all ranks are gathered. Padding has finite values, no gradient, and no effect on any token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megalard.model.projection import Projection


class BlockBatch(Protocol):
    """What the decoder needs to know of the blocks it reads; see ``megalard.data.batch.Batch``.

    Attributes:
        tokens_bs: int64 [b, s], the token ids.
        position_bs: int64 [b, s], the position of each token.
        reach_bs: int64 [b, s], one more than the largest position in the token's document.
    """

    @property
    def tokens_bs(self) -> torch.Tensor: ...

    @property
    def position_bs(self) -> torch.Tensor: ...

    @property
    def reach_bs(self) -> torch.Tensor: ...


class Ops(Protocol):
    """The operations that depend on how the model and its input are split over ranks.

    ``megalard.parallel.ops.ParallelOps`` implements them.
    """

    def column(self, x: torch.Tensor, *projections: Projection) -> list[torch.Tensor]:
        """Apply projections to one input: [t/tp, in] to [t, out_i/tp] for each, with padding."""
        ...

    def row(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        """Apply a projection to features that are split over ranks: [t, in/tp] to [t/tp, out].

        The input may have padding.
        """
        ...

    def embed(self, token_t: torch.Tensor, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """Look up token ids [t] in the embedding: [t/tp, hidden].

        Args:
            token_t: int64 [t].
            weight: [vocab/tp, hidden], the rows of the embedding from ``first_row``.
        """
        ...

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply hidden states [t/tp, hidden] by this rank's rows of the head: [t, vocab/tp].

        The rows have padding.
        """
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the tokens of all ranks, with padding: [t/tp, features] to [t, features]."""
        ...

    def norm_full_width(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, features: int
    ) -> torch.Tensor:
        """Apply an RMS norm over ``features`` features that are split over ranks.

        Args:
            x: [t, features/tp]; with more ranks than K/V heads, several ranks hold the same part.
            weight: [features/tp].
        """
        ...

    def attend(self, qkv: Qkv, batch: BlockBatch, window: int | None) -> torch.Tensor:
        """Return the attention output [b, s, Hq, d] of causal attention within each document."""
        ...

    def with_dropout(self, token_t: torch.Tensor) -> Ops:
        """Return the same operations with LoRA's dropout switched on.

        Args:
            token_t: int64 [t], one number per token, unique within the step, to draw masks from.
        """
        ...


def without_padding(x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the first ``num_tokens`` rows; ``x`` itself if there is no padding after them."""
    return x if x.shape[0] == num_tokens else x[:num_tokens]


@dataclass(frozen=True)
class Context:
    """What every layer needs to know of the blocks it reads.

    Attributes:
        cos, sin: fp32 [b, 1, s, rotary_dim], for the s tokens of this rank.
        batch: the blocks.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    batch: BlockBatch


@dataclass
class Qkv:
    """q [b, Hq, s, d], k and v [b, Hkv, s, d] of one layer; q and k after RoPE."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
