"""Linear layers, embedding and head over the tensor-parallel axis, with sequence parallelism.

The decoder is handed one ``TensorParallel`` and reads the same for one GPU and for many.

    column-parallel   x [t/tp, in]  --gather-->  [t, in]  @ W_localᵀ  ->  y [t, out/tp]
    row-parallel      x [t, in/tp]  @ W_localᵀ  ->  [t, out]  --reduce-scatter-->  y [t/tp, out]

A frozen weight gets no weight gradient, and autograd then keeps no input for it. LoRA follows the
same two exchanges with the rank as the feature size: the column-parallel A runs on the token
share before the gather, so no rank repeats another's work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megalard.parallel.collectives import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megalard.parallel.mesh import SINGLE, Axis


class TensorParallel:
    """The products of a decoder, on this rank's slices of its weights.

    Args:
        axis: the tp axis; of size 1 in a single process, where no exchange takes place.
        token_t: int64 [t], the numbers of a micro-batch's tokens that LoRA's dropout is drawn
            from; None to read without dropout.
    """

    def __init__(self, axis: Axis = SINGLE, token_t: torch.Tensor | None = None):
        self.axis, self.token_t = axis, token_t

    def column(self, x: torch.Tensor, *projections: nn.Module) -> list[torch.Tensor]:
        """Several projections of one input: [t/tp, in] to [t, out_i/tp] each."""
        adapted = [p for p in projections if p.lora_A is not None]
        low = {}
        if adapted:
            # one mask for all projections of an input, so that their A's are one product
            first_row = self.axis.rank * x.shape[0]
            dropped = adapted[0].lora_dropout(x, self.token_t, first_row=first_row, first_feature=0)
            stacked = torch.cat([p.lora_A for p in adapted]).to(x.dtype)
            joint = gather_from_sequence_parallel_region(F.linear(dropped, stacked), self.axis)
            parts = joint.split([p.lora_A.shape[0] for p in adapted], dim=-1)
            low = dict(zip(adapted, parts, strict=True))
        x = gather_from_sequence_parallel_region(x, self.axis)
        outputs = []
        for p in projections:
            y = F.linear(x, p.weight.to(x.dtype), None if p.bias is None else p.bias.to(x.dtype))
            if p in low:
                y = torch.addmm(y, low[p], p.lora_B.to(x.dtype).t(), alpha=p.lora_scale)
            outputs.append(y)
        return outputs

    def row(self, x: torch.Tensor, p: nn.Module) -> torch.Tensor:
        """[t, in/tp] to [t/tp, out]; the bias is added once, after the sum."""
        y = F.linear(x, p.weight.to(x.dtype))
        y = reduce_scatter_to_sequence_parallel_region(y, self.axis)
        if p.lora_A is not None:
            first_feature = self.axis.rank * x.shape[1]
            dropped = p.lora_dropout(x, self.token_t, first_row=0, first_feature=first_feature)
            low = F.linear(dropped, p.lora_A.to(x.dtype))
            low = reduce_scatter_to_sequence_parallel_region(low, self.axis)
            y = torch.addmm(y, low, p.lora_B.to(x.dtype).t(), alpha=p.lora_scale)
        if p.bias is not None:
            y = y + p.bias.to(x.dtype)
        return y

    def embed(self, token_t: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Vocab-parallel embedding: token ids [t] to [t/tp, hidden].

        ``weight`` [vocab/tp, hidden] holds the rows from ``first``; other ranks' tokens add zero.
        """
        if self.axis.size == 1:
            return F.embedding(token_t, weight)
        local = token_t - first
        mine = (local >= 0) & (local < weight.shape[0])
        # a rank past an uneven vocabulary's end holds no row, yet takes part in every exchange
        weight = weight if weight.shape[0] else F.pad(weight, (0, 0, 0, 1))
        rows = F.embedding(local.masked_fill(~mine, 0), weight) * mine[:, None]
        return reduce_scatter_to_sequence_parallel_region(rows, self.axis)

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Hidden states [t/tp, hidden] to this rank's logits [t, vocab/tp]."""
        return F.linear(self.gather(x), weight.to(x.dtype))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[t/tp, features] to [t, features]."""
        return gather_from_sequence_parallel_region(x, self.axis)
