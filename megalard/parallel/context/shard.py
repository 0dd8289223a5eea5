"""Which tokens of a block a context-parallel rank owns.

Every block of ``length`` tokens is cut into 2P pieces. Rank r of the cp axis owns the pieces r and
2P-1-r, one after the other; together they are its chunk. This zigzag balances causal attention:

    P = 4      piece   0   1   2   3   4   5   6   7
               rank    0   1   2   3   3   2   1   0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalard.errors import UserError
from megalard.parallel.collectives import all_gather_tokens, reduce_scatter_tokens
from megalard.parallel.context.schedule import pieces_of
from megalard.parallel.mesh import SINGLE, Axis


@dataclass(frozen=True)
class Span:
    """Consecutive queries of this rank inside one document.

    Attributes:
        row: row of the batch.
        start, end: the queries, counted among this rank's tokens of the row.
        key_start, key_end: the tokens that the queries attend to, counted in the whole block. The
            last query is the last of these tokens.
    """

    row: int
    start: int
    end: int
    key_start: int
    key_end: int


@dataclass(frozen=True)
class SequenceShard:
    """This rank's share of blocks of ``length`` tokens.

    Attributes:
        length: tokens per block.
        axis: the cp axis.

    Raises:
        UserError: the length does not divide into 2P pieces.
    """

    length: int
    axis: Axis = SINGLE

    def __post_init__(self):
        if self.length % self.num_pieces:
            raise UserError(
                f"a block of {self.length} tokens does not divide into {self.num_pieces} pieces "
                f"(two for each of {self.axis.size} cp ranks): choose a multiple of "
                f"{self.num_pieces}"
            )

    @property
    def num_pieces(self) -> int:
        """The number of pieces of a block: 2P, or 1 without context parallelism."""
        return 1 if self.axis.size == 1 else 2 * self.axis.size

    @property
    def piece_length(self) -> int:
        """Tokens per piece."""
        return self.length // self.num_pieces

    @property
    def local_pieces(self) -> tuple[int, ...]:
        """The pieces of this rank, in the order of the block."""
        return pieces_of(self.axis.rank, self.axis.size)

    @property
    def local_length(self) -> int:
        """Tokens of this rank."""
        return self.length // self.axis.size

    def cut(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's tokens of a tensor that has the whole block along ``dim``."""
        if self.axis.size == 1:
            return x
        size = self.piece_length
        return torch.cat([x.narrow(dim, p * size, size) for p in self.local_pieces], dim)

    def local_positions(self) -> torch.Tensor:
        """Return the place in the block of each of this rank's tokens, int64 [local_length]."""
        return self.positions_of(self.axis.rank)

    def positions_of(self, rank: int) -> torch.Tensor:
        """Return the place in the block of each token of a rank, int64 [local_length]."""
        size = self.piece_length
        pieces = pieces_of(rank, self.axis.size)
        return torch.cat([torch.arange(p * size, (p + 1) * size) for p in pieces])

    def spans(self, documents: tuple[tuple[int, int, int], ...]) -> tuple[Span, ...]:
        """Return this rank's queries in each document, given as (row, start, end) in the block."""
        size, spans = self.piece_length, []
        for row, document_start, document_end in documents:
            for place, piece in enumerate(self.local_pieces):
                start = max(document_start, piece * size)
                end = min(document_end, (piece + 1) * size)
                if start < end:
                    shift = (place - piece) * size
                    spans.append(Span(row, start + shift, end + shift, document_start, end))
        return tuple(sorted(spans, key=lambda span: (span.row, span.start)))

    def gather(self, x_bhsd: torch.Tensor) -> torch.Tensor:
        """Gather [b, h, s / P, d] of each rank to [b, h, s, d], in the order of the block.

        In the backward pass the gradients are summed over ranks and scattered.
        """
        return x_bhsd if self.axis.size == 1 else _GatherSequence.apply(x_bhsd, self.axis)


class _GatherSequence(torch.autograd.Function):
    """All-gather forward and reduce-scatter backward, with the pieces put in order."""

    @staticmethod
    def forward(ctx, x_bhsd, axis):
        ctx.axis = axis
        chunks = all_gather_tokens(x_bhsd.contiguous()[None], axis)
        early, late = chunks.chunk(2, dim=3)
        ordered = torch.cat((early, late.flip(0)))
        return ordered.permute(1, 2, 0, 3, 4).flatten(2, 3)

    @staticmethod
    def backward(ctx, grad):
        size = ctx.axis.size
        pieces = grad.unflatten(2, (2 * size, -1)).permute(2, 0, 1, 3, 4)
        early, late = pieces[:size], pieces[size:].flip(0)
        return reduce_scatter_tokens(torch.cat((early, late), dim=3), ctx.axis)[0], None
