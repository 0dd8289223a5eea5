"""Which pairs (row i, column j) a relation may use, as intervals on both sides.

Causal order, padding, packed documents and pairs of sequence chunks all leave each row an interval
of columns and each column an interval of rows, so that is the only mask the kernels know. Its
memory is linear in the sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megalard.transfer import to_device


@dataclass(frozen=True)
class IntervalMask:
    """Row i sees columns ``col_lo <= j < col_hi``; column j is seen by ``row_lo <= i < row_hi``.

    ``col_*_bn`` are [b, n] and ``row_*_bm`` [b, m], all int32 on one device. The two sides describe
    the same set of pairs; an empty interval has lo >= hi (the constructors below write 0, 0).
    ``causal`` promises that no row sees a column of a larger index, so that kernels may rely on it
    without reading the intervals; it restricts nothing. The tensors are not to be changed in place.
    Raises ValueError for other shapes, dtypes or mixed devices.
    """

    col_lo_bn: Tensor
    col_hi_bn: Tensor
    row_lo_bm: Tensor
    row_hi_bm: Tensor
    causal: bool = False

    def __post_init__(self):
        tensors = self._tensors()
        if any(x.dtype != torch.int32 or x.ndim != 2 for x in tensors):
            raise ValueError("mask intervals must be int32 tensors of two dimensions")
        if len({x.device for x in tensors}) > 1:
            raise ValueError("mask intervals must all be on one device")
        if (
            self.col_lo_bn.shape != self.col_hi_bn.shape
            or self.row_lo_bm.shape != self.row_hi_bm.shape
            or self.b != self.row_lo_bm.shape[0]
        ):
            raise ValueError("mask intervals must be [b, n], [b, n], [b, m], [b, m]")

    @property
    def b(self) -> int:
        return self.col_lo_bn.shape[0]

    @property
    def n(self) -> int:
        return self.col_lo_bn.shape[1]

    @property
    def m(self) -> int:
        return self.row_lo_bm.shape[1]

    @property
    def device(self) -> torch.device:
        return self.col_lo_bn.device

    def to(self, device: torch.device | str) -> "IntervalMask":
        """The same mask on another device."""
        return IntervalMask(*(x.to(device) for x in self._tensors()), causal=self.causal)

    def kept(self, make: Callable, *arguments) -> object:
        """``make(self, *arguments)``, made once: a mask serves many layers."""
        made, key = self.__dict__.setdefault("_made", {}), (make, arguments)
        if key not in made:
            made[key] = make(self, *arguments)
        return made[key]

    def _tensors(self) -> list[Tensor]:
        return [self.col_lo_bn, self.col_hi_bn, self.row_lo_bm, self.row_hi_bm]


def by_block(x_bn: Tensor, size: int, past_the_end: int) -> Tensor:
    """[b, n] as [b, blocks, size], the last block filled up with ``past_the_end``."""
    pad = -x_bn.shape[1] % size
    return torch.nn.functional.pad(x_bn, (0, pad), value=past_the_end).unflatten(1, (-1, size))


def full_mask(b: int, n: int, m: int, device: torch.device | str = "cpu") -> IntervalMask:
    """Every row sees every column."""
    return IntervalMask(
        *(
            torch.full((b, size), value, dtype=torch.int32, device=device)
            for size, value in ((n, 0), (n, m), (m, 0), (m, n))
        )
    )


def causal_mask(b: int, n: int, device: torch.device | str = "cpu") -> IntervalMask:
    """Row i sees columns j <= i; one document, no padding."""
    start_bs = torch.zeros(b, n, dtype=torch.int32, device=device)
    return document_mask(start_bs, torch.full_like(start_bs, n))


def document_mask(doc_start_bs: Tensor, doc_end_bs: Tensor, causal: bool = True) -> IntervalMask:
    """Tokens see their own document only (and, if causal, nothing later than themselves).

    ``doc_start_bs``, ``doc_end_bs``: integer [b, s], the half-open interval [start, end) of the
    document each token belongs to, in positions of its own row. A padding token has start = end = 0
    and sees and is seen by nothing; padding may stand anywhere.
    """
    s = doc_start_bs.shape[-1]
    return chunk_mask(doc_start_bs, doc_end_bs, row_offset=0, n=s, col_offset=0, m=s, causal=causal)


def chunk_mask(
    doc_start_bs: Tensor,
    doc_end_bs: Tensor,
    *,
    row_offset: int,
    n: int,
    col_offset: int,
    m: int,
    causal: bool = True,
) -> IntervalMask:
    """The part of a global `document_mask` between two chunks of the sequence.

    Rows are the n positions from ``row_offset`` on, columns the m positions from ``col_offset`` on.
    ``doc_start_bs``, ``doc_end_bs`` [b, s] describe the whole sequence, as in `document_mask`; the
    intervals of the result count from the chunks' own starts. Raises ValueError for chunks that
    leave the sequence.
    """
    if doc_start_bs.shape != doc_end_bs.shape or doc_start_bs.ndim != 2:
        raise ValueError(
            f"document starts {list(doc_start_bs.shape)} and ends {list(doc_end_bs.shape)} "
            "must both be [b, s]"
        )
    s = doc_start_bs.shape[1]
    if min(row_offset, col_offset) < 0 or row_offset + n > s or col_offset + m > s:
        raise ValueError(
            f"chunks [{row_offset}, {row_offset + n}) and [{col_offset}, {col_offset + m}) "
            f"must lie inside the sequence of {s} tokens"
        )
    rows, cols = torch.arange(row_offset, row_offset + n), torch.arange(col_offset, col_offset + m)
    return places_mask(doc_start_bs, doc_end_bs, rows, cols, causal=causal)


def places_mask(
    doc_start_bs: Tensor,
    doc_end_bs: Tensor,
    row_place_n: Tensor,
    col_place_m: Tensor,
    *,
    causal: bool = True,
) -> IntervalMask:
    """The part of a global `document_mask` between some of its rows and some of its columns.

    ``doc_start_bs``, ``doc_end_bs`` [b, s] describe the whole sequence, as in `document_mask`.
    ``row_place_n``, ``col_place_m``: int64 on the host, where the rows and columns stand in it,
    ascending and inside it; the intervals of the result count them in that order.
    """
    common = min(len(row_place_n), len(col_place_m))
    aligned = torch.equal(row_place_n[:common], col_place_m[:common])
    rows, cols = (to_device(x, doc_start_bs.device) for x in (row_place_n, col_place_m))

    def visible(own, other, later: bool):
        """The interval among ``other`` of each of ``own``; ``later`` says that these are rows."""
        first_b, last_b = doc_start_bs[:, own], doc_end_bs[:, own]
        live_b = (first_b <= own) & (own < last_b)
        if causal:
            first_b, last_b = (first_b, own + 1) if later else (own, last_b)
        lo_b, hi_b = (
            torch.searchsorted(other, x.to(other.dtype).expand_as(live_b).contiguous())
            for x in (first_b, last_b)
        )
        live_b = live_b & (lo_b < hi_b)
        return ((x * live_b).to(torch.int32) for x in (lo_b, hi_b))

    return IntervalMask(
        *visible(rows, cols, later=True),
        *visible(cols, rows, later=False),
        causal=causal and aligned,
    )


def segment_mask(segment_ids_bs: Tensor, causal: bool = True) -> IntervalMask:
    """`document_mask` from one id per token: integer [b, s], contiguous runs, negative = padding.

    Raises ValueError if an id comes back after another one.
    """
    return document_mask(*segment_bounds(segment_ids_bs), causal=causal)


def segment_bounds(segment_ids_bs: Tensor) -> tuple[Tensor, Tensor]:
    """(doc_start_bs, doc_end_bs) of the runs of equal ids, as `document_mask` takes them."""
    if segment_ids_bs.ndim != 2:
        raise ValueError(f"segment ids must be [b, s], not {list(segment_ids_bs.shape)}")
    b, s = segment_ids_bs.shape
    position_s = torch.arange(s, device=segment_ids_bs.device)
    edge_bs = torch.ones(b, s + 1, dtype=torch.bool, device=segment_ids_bs.device)
    edge_bs[:, 1:s] = segment_ids_bs[:, 1:] != segment_ids_bs[:, :-1]
    valid_bs = segment_ids_bs >= 0

    # Only the first token of each run keeps its id, so an id seen twice is a run that came back.
    opening_bs = torch.where(edge_bs[:, :-1] & valid_bs, segment_ids_bs, -1).sort(dim=1).values
    if ((opening_bs[:, 1:] == opening_bs[:, :-1]) & (opening_bs[:, 1:] >= 0)).any():
        raise ValueError("each segment id must be one contiguous run within its row")

    start_bs = torch.where(edge_bs[:, :-1], position_s, 0).cummax(dim=1).values
    closing_bs = torch.where(edge_bs[:, 1:], position_s + 1, s)
    end_bs = closing_bs.flip(1).cummin(dim=1).values.flip(1)
    return start_bs * valid_bs, end_bs * valid_bs
