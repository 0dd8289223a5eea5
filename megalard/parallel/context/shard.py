"""The sequence axis: which tokens a rank owns, and what it exchanges with the others.

Every block of ``length`` tokens is cut into 2P pieces; rank r of the cp axis owns the pieces r and
2P-1-r (the zigzag that balances causal attention), one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalard.errors import UserError
from megalard.parallel.collectives import all_gather_tokens, reduce_scatter_tokens
from megalard.parallel.context.schedule import pieces_of
from megalard.parallel.mesh import SINGLE, Axis


@dataclass(frozen=True)
class Span:
    """Rows ``start:end`` of this rank's tokens, in batch row ``row``, of one document.

    They attend to tokens ``first:last`` of the whole block; the last of them is the last query.
    """

    row: int
    start: int
    end: int
    first: int
    last: int


@dataclass(frozen=True)
class SequenceShard:
    """This rank's share of blocks of ``length`` tokens.

    Raises:
        UserError: the length does not divide into 2P pieces.
    """

    length: int
    axis: Axis = SINGLE

    def __post_init__(self):
        if self.length % len(self.all_pieces):
            raise UserError(
                f"a block of {self.length} tokens does not divide into {len(self.all_pieces)} "
                f"pieces (two for each of {self.axis.size} cp ranks): choose a multiple"
            )

    @property
    def all_pieces(self) -> range:
        return range(1 if self.axis.size == 1 else 2 * self.axis.size)

    @property
    def piece_length(self) -> int:
        return self.length // len(self.all_pieces)

    @property
    def own_pieces(self) -> tuple[int, ...]:
        return pieces_of(self.axis.rank, self.axis.size)

    @property
    def own_length(self) -> int:
        return self.length // self.axis.size

    def cut(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's tokens of a tensor that has the whole block along ``dim``."""
        if self.axis.size == 1:
            return x
        size = self.piece_length
        return torch.cat([x.narrow(dim, p * size, size) for p in self.own_pieces], dim)

    def own_positions(self) -> torch.Tensor:
        """int64 [own_length]: where each of this rank's tokens stands in the block."""
        return self.positions_of(self.axis.rank)

    def positions_of(self, rank: int) -> torch.Tensor:
        """int64 [own_length]: where each of some rank's tokens stands in the block."""
        size = self.piece_length
        pieces = pieces_of(rank, self.axis.size)
        return torch.cat([torch.arange(p * size, (p + 1) * size) for p in pieces])

    def spans(self, documents: tuple[tuple[int, int, int], ...]) -> tuple[Span, ...]:
        """The parts of the blocks' documents (row, start, end) that this rank's queries are in."""
        size, found = self.piece_length, []
        for row, start, end in documents:
            for place, piece in enumerate(self.own_pieces):
                first, last = max(start, piece * size), min(end, (piece + 1) * size)
                if first < last:
                    shift = (place - piece) * size
                    found.append(Span(row, first + shift, last + shift, start, last))
        return tuple(sorted(found, key=lambda span: (span.row, span.start)))

    def gather(self, x_bhsd: torch.Tensor) -> torch.Tensor:
        """[b, h, s / P, d] of each rank to the whole sequence; gradients are summed back."""
        return x_bhsd if self.axis.size == 1 else _GatherSequence.apply(x_bhsd, self.axis)


class _GatherSequence(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward, with the pieces put in order."""

    @staticmethod
    def forward(ctx, x_bhsd, axis):
        ctx.axis = axis
        parts = all_gather_tokens(x_bhsd.contiguous()[None], axis)
        early, late = parts.chunk(2, dim=3)
        ordered = torch.cat((early, late.flip(0)))
        return ordered.permute(1, 2, 0, 3, 4).flatten(2, 3)

    @staticmethod
    def backward(ctx, grad):
        size = ctx.axis.size
        pieces = grad.unflatten(2, (2 * size, -1)).permute(2, 0, 1, 3, 4)
        early, late = pieces[:size], pieces[size:].flip(0)
        return reduce_scatter_tokens(torch.cat((early, late), dim=3), ctx.axis)[0], None


class Exchange:
    """Tensors on their way to one rank and from another; ``wait`` gives what came.

    Posting returns at once, so that work on what is here overlaps the transfer. Every rank of the
    axis posts the same exchanges in the same order.

    Args:
        tensors: contiguous; the received ones have the same shapes.
        to, source: ranks within the axis.
    """

    def __init__(self, tensors: list[torch.Tensor], to: int, source: int, axis: Axis):
        self.received = [torch.empty_like(x) for x in tensors]
        self.sent_bytes = sum(x.numel() * x.element_size() for x in tensors)
        self._sent = tensors  # kept alive until the transfer is over
        operations = [
            dist.P2POp(dist.isend, x, group=axis.group, group_peer=to) for x in tensors
        ] + [dist.P2POp(dist.irecv, x, group=axis.group, group_peer=source) for x in self.received]
        self._requests = dist.batch_isend_irecv(operations)

    def wait(self) -> list[torch.Tensor]:
        for request in self._requests:
            request.wait()
        return self.received
