"""The operations of a decoder that is split over tensor- and context-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F

from megalard.model.decoder import Decoder
from megalard.model.ops import BlockBatch, Qkv
from megalard.model.projection import Projection
from megalard.parallel.collectives import gather_from_sequence_parallel_region, padded_rows
from megalard.parallel.context.attention import ShardedBatch, attend_over_axis
from megalard.parallel.mesh import SINGLE, Axis
from megalard.parallel.tensor.linear import (
    column_parallel,
    row_parallel,
    vocab_parallel_embedding,
)
from megalard.parallel.tensor.norm import rms_norm_over_axis


def tensor_axis(decoder: Decoder) -> Axis:
    """Return the tp axis over which a decoder is split."""
    return cast(ParallelOps, decoder.ops).axis


@dataclass(frozen=True)
class ParallelOps:
    """One rank's implementation of ``megalard.model.ops.Ops``.

    Attributes:
        axis: the tp axis; of size 1 in a single process, where nothing is exchanged.
        token_t: int64 [t], with padding, the numbers that LoRA's dropout is drawn from, one per
            token of the micro-batch; None switches dropout off.
    """

    axis: Axis = SINGLE
    token_t: torch.Tensor | None = None

    def with_dropout(self, token_t: torch.Tensor) -> ParallelOps:
        """Return the same operations with LoRA's dropout switched on."""
        return replace(self, token_t=padded_rows(token_t, self.axis))

    def column(self, x: torch.Tensor, *projections: Projection) -> list[torch.Tensor]:
        return column_parallel(x, projections, self.axis, self.token_t)

    def row(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        return row_parallel(x, projection, self.axis, self.token_t)

    def embed(self, token_t: torch.Tensor, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        return vocab_parallel_embedding(token_t, weight, first_row, self.axis)

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(self.gather(x), weight.to(x.dtype))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return gather_from_sequence_parallel_region(x, self.axis)

    def norm_full_width(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, features: int
    ) -> torch.Tensor:
        return rms_norm_over_axis(x, weight, eps, features, self.axis)

    def attend(self, qkv: Qkv, batch: BlockBatch, window: int | None) -> torch.Tensor:
        return attend_over_axis(qkv.q, qkv.k, qkv.v, window, cast(ShardedBatch, batch))
