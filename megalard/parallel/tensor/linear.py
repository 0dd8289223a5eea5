"""Linear layers over the tensor-parallel axis, with sequence parallelism.

Between layers a rank holds t/tp of the tokens with all features (sequence-parallel region). Inside
attention and the MLP it holds all tokens with 1/tp of the features (tensor-parallel region). For
tp = 2 and four tokens A B C D with features 1 2 3 4:

              residual           after column        after row
              [t/tp, hidden]     [t, out/tp]         [t/tp, hidden]

               1 2 3 4             1 2                1 2 3 4
    rank 0   A # # # #           A # #              A # # # #
             B # # # #           B # #              B # # # #
                                 C # #
                                 D # #
                         gather         reduce-
                        --------->      scatter
                         tokens        --------->
               1 2 3 4             3 4                1 2 3 4
    rank 1   C # # # #           A # #              C # # # #
             D # # # #           B # #              D # # # #
                                 C # #
                                 D # #

    column-parallel   x [t/tp, in]  --gather-->  [t, in]  @ W_localᵀ  ->  y [t, out/tp]
    row-parallel      x [t, in/tp]  @ W_localᵀ  ->  [t, out]  --reduce-scatter-->  y [t/tp, out]

A frozen weight gets no gradient, and autograd then does not keep the layer's input. LoRA uses the
same two exchanges, with the rank of the adapter as the number of features: the A of a
column-parallel layer is applied to this rank's tokens before the gather, so that no rank repeats
the work of another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalard.model.projection import Projection
from megalard.parallel.collectives import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megalard.parallel.mesh import Axis


def column_parallel(
    x: torch.Tensor, projections: tuple[Projection, ...], axis: Axis, token_t: torch.Tensor | None
) -> list[torch.Tensor]:
    """Apply column-parallel projections to one input: [t/tp, in] to [t, out_i/tp] for each.

    Args:
        x: this rank's tokens.
        projections: this rank's slices of the weights.
        axis: the tp axis.
        token_t: as for ``megalard.model.lora.Dropout``.
    """
    adapted = [p for p in projections if p.lora_A is not None]
    low_rank = {}
    if adapted:
        # The projections share one dropout mask, so that one product applies all of their A's.
        first_row = axis.rank * x.shape[0]
        dropped = adapted[0].lora_dropout(x, token_t, first_row=first_row, first_feature=0)
        stacked = torch.cat([p.lora_A for p in adapted]).to(x.dtype)
        joint = gather_from_sequence_parallel_region(F.linear(dropped, stacked), axis)
        parts = joint.split([p.lora_A.shape[0] for p in adapted], dim=-1)
        low_rank = dict(zip(adapted, parts, strict=True))
    x = gather_from_sequence_parallel_region(x, axis)
    outputs = []
    for p in projections:
        y = F.linear(x, p.weight.to(x.dtype), None if p.bias is None else p.bias.to(x.dtype))
        if p in low_rank:
            y = torch.addmm(y, low_rank[p], p.lora_B.to(x.dtype).t(), alpha=p.lora_scale)
        outputs.append(y)
    return outputs


def row_parallel(
    x: torch.Tensor, p: Projection, axis: Axis, token_t: torch.Tensor | None
) -> torch.Tensor:
    """Apply a row-parallel projection: [t, in/tp] to [t/tp, out].

    The bias is added once, after the sum over ranks.
    """
    y = F.linear(x, p.weight.to(x.dtype))
    y = reduce_scatter_to_sequence_parallel_region(y, axis)
    if p.lora_A is not None:
        first_feature = axis.rank * x.shape[1]
        dropped = p.lora_dropout(x, token_t, first_row=0, first_feature=first_feature)
        low_rank = F.linear(dropped, p.lora_A.to(x.dtype))
        low_rank = reduce_scatter_to_sequence_parallel_region(low_rank, axis)
        y = torch.addmm(y, low_rank, p.lora_B.to(x.dtype).t(), alpha=p.lora_scale)
    if p.bias is not None:
        y = y + p.bias.to(x.dtype)
    return y


def vocab_parallel_embedding(
    token_t: torch.Tensor, weight: torch.Tensor, first_row: int, axis: Axis
) -> torch.Tensor:
    """Look up token ids [t] and return [t/tp, hidden].

    Args:
        weight: [vocab/tp, hidden], the rows of the embedding from ``first_row``. Tokens whose row
            is on another rank contribute zero here.
    """
    if axis.size == 1:
        return F.embedding(token_t, weight)
    local_id = token_t - first_row
    is_local = (local_id >= 0) & (local_id < weight.shape[0])
    # A rank beyond the end of an uneven vocabulary holds no row, and still joins every exchange.
    weight = weight if weight.shape[0] else F.pad(weight, (0, 0, 0, 1))
    rows = F.embedding(local_id.masked_fill(~is_local, 0), weight) * is_local[:, None]
    return reduce_scatter_to_sequence_parallel_region(rows, axis)
