"""Which pairs (row i, column j) a relation may use, as intervals on both sides.

Causal order, padding, packed documents and pairs of sequence chunks have one thing in common: each
row sees an interval of columns, and each column is seen by an interval of rows. So intervals are
the only masks that the kernels support. Their memory is linear in the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class IntervalMask:
    """Row i sees columns ``col_lo <= j < col_hi``; column j is seen by ``row_lo <= i < row_hi``.

    The two sides describe the same set of pairs. An empty interval has lo >= hi; the constructors
    below write [0, 0). The tensors must not be changed in place.

    Attributes:
        col_lo_bn, col_hi_bn: int32 [b, n], the columns that each row sees.
        row_lo_bm, row_hi_bm: int32 [b, m], the rows that see each column, on the same device.
        causal: Promises that no row sees a column of a larger index, so that kernels may rely on it
            without reading the intervals. It restricts nothing by itself.

    Raises:
        ValueError: A shape or dtype is not as above, or the tensors are on several devices.
    """

    col_lo_bn: Tensor
    col_hi_bn: Tensor
    row_lo_bm: Tensor
    row_hi_bm: Tensor
    causal: bool = False

    def __post_init__(self):
        tensors = self._tensors()
        for x in tensors:
            if x.dtype != torch.int32 or x.ndim != 2:
                raise ValueError(
                    "mask intervals must be int32 tensors of two dimensions, "
                    f"not {x.dtype} {list(x.shape)}"
                )
        devices = sorted({str(x.device) for x in tensors})
        if len(devices) > 1:
            raise ValueError(f"mask intervals must all be on one device, not on {devices}")
        if (
            self.col_lo_bn.shape != self.col_hi_bn.shape
            or self.row_lo_bm.shape != self.row_hi_bm.shape
            or self.b != self.row_lo_bm.shape[0]
        ):
            shapes = ", ".join(str(list(x.shape)) for x in tensors)
            raise ValueError(f"mask intervals must be [b, n], [b, n], [b, m], [b, m], not {shapes}")

    @property
    def b(self) -> int:
        """The number of sequences."""
        return self.col_lo_bn.shape[0]

    @property
    def n(self) -> int:
        """The number of rows per sequence."""
        return self.col_lo_bn.shape[1]

    @property
    def m(self) -> int:
        """The number of columns per sequence."""
        return self.row_lo_bm.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the intervals."""
        return self.col_lo_bn.device

    def to(self, device: torch.device | str) -> IntervalMask:
        """Return the same mask on another device."""
        col_lo, col_hi, row_lo, row_hi = (x.to(device) for x in self._tensors())
        return IntervalMask(col_lo, col_hi, row_lo, row_hi, causal=self.causal)

    def cached(self, make: Callable[..., Result], *arguments) -> Result:
        """Return ``make(self, *arguments)``, computed once: one mask serves many layers."""
        results, key = self.__dict__.setdefault("_results", {}), (make, arguments)
        if key not in results:
            results[key] = make(self, *arguments)
        return results[key]

    def _tensors(self) -> list[Tensor]:
        return [self.col_lo_bn, self.col_hi_bn, self.row_lo_bm, self.row_hi_bm]


def split_into_blocks(x_bn: Tensor, size: int, past_the_end: int) -> Tensor:
    """Return [b, n] as [b, blocks, size], with the last block padded by ``past_the_end``."""
    pad = -x_bn.shape[1] % size
    return torch.nn.functional.pad(x_bn, (0, pad), value=past_the_end).unflatten(1, (-1, size))


def full_mask(b: int, n: int, m: int, device: torch.device | str = "cpu") -> IntervalMask:
    """Return the mask in which each of n rows sees all m columns."""

    def constant(size: int, value: int) -> Tensor:
        return torch.full((b, size), value, dtype=torch.int32, device=device)

    return IntervalMask(constant(n, 0), constant(n, m), constant(m, 0), constant(m, n))


def causal_mask(b: int, n: int, device: torch.device | str = "cpu") -> IntervalMask:
    """Return the mask in which row i sees the columns j <= i: one document, no padding."""
    start_bs = torch.zeros(b, n, dtype=torch.int32, device=device)
    return document_mask(start_bs, torch.full_like(start_bs, n))


def document_mask(doc_start_bs: Tensor, doc_end_bs: Tensor, causal: bool = True) -> IntervalMask:
    """Return the mask in which tokens see their document only, and nothing later if ``causal``.

    Args:
        doc_start_bs, doc_end_bs: Integer [b, s], the half-open interval [start, end) of the
            document that each token belongs to, in positions of its sequence. A padding token has
            start = end = 0; it sees no token and no token sees it. Padding may stand anywhere.
        causal: Whether a token sees only tokens that are not later than itself.
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
    """Return the part of a ``document_mask`` between two chunks of the sequence.

    Rows and columns of the result count from the starts of their chunks.

    Args:
        doc_start_bs, doc_end_bs: [b, s] of the entire sequence, as in ``document_mask``.
        row_offset, n: The rows are the n positions from ``row_offset`` on.
        col_offset, m: The columns are the m positions from ``col_offset`` on.
        causal: As in ``document_mask``.

    Raises:
        ValueError: A chunk reaches beyond the sequence.
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
    device = doc_start_bs.device
    rows = torch.arange(row_offset, row_offset + n, device=device)
    cols = torch.arange(col_offset, col_offset + m, device=device)
    aligned = row_offset == col_offset or min(n, m) == 0
    return places_mask(doc_start_bs, doc_end_bs, rows, cols, aligned=aligned, causal=causal)


def places_mask(
    doc_start_bs: Tensor,
    doc_end_bs: Tensor,
    row_place_n: Tensor,
    col_place_m: Tensor,
    *,
    aligned: bool,
    causal: bool = True,
) -> IntervalMask:
    """Return the part of a ``document_mask`` between some of its rows and some of its columns.

    Rows and columns of the result count in the order of their places.

    Args:
        doc_start_bs, doc_end_bs: [b, s] of the entire sequence, as in ``document_mask``.
        row_place_n, col_place_m: int64 [n] and [m] on the device of the documents: the positions
            of the rows and columns in the sequence, ascending.
        aligned: Whether ``row_place_n[i] == col_place_m[i]`` for every i < min(n, m). The caller
            has to say so, because reading the places here would wait for the device.
        causal: As in ``document_mask``.
    """

    def visible(
        place: Tensor, other_place: Tensor, others_are_earlier: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the interval [lo, hi) of the other side that each place sees, or is seen by."""
        start, end = doc_start_bs[:, place], doc_end_bs[:, place]
        nonempty = (start <= place) & (place < end)
        if causal:
            start, end = (start, place + 1) if others_are_earlier else (place, end)
        lo, hi = (
            torch.searchsorted(
                other_place, x.to(other_place.dtype).expand_as(nonempty).contiguous()
            )
            for x in (start, end)
        )
        nonempty = nonempty & (lo < hi)
        return (lo * nonempty).to(torch.int32), (hi * nonempty).to(torch.int32)

    col_lo, col_hi = visible(row_place_n, col_place_m, others_are_earlier=True)
    row_lo, row_hi = visible(col_place_m, row_place_n, others_are_earlier=False)
    return IntervalMask(col_lo, col_hi, row_lo, row_hi, causal=causal and aligned)


def segment_mask(segment_ids_bs: Tensor, causal: bool = True) -> IntervalMask:
    """Return the ``document_mask`` of documents that are given by one id per token.

    Args:
        segment_ids_bs: Integer [b, s]. Each id is one contiguous run; a negative id is padding.
        causal: As in ``document_mask``.

    Raises:
        ValueError: An id has several runs.
    """
    return document_mask(*segment_bounds(segment_ids_bs), causal=causal)


def segment_bounds(segment_ids_bs: Tensor) -> tuple[Tensor, Tensor]:
    """Return (doc_start_bs, doc_end_bs) for ``document_mask`` from ids as in ``segment_mask``."""
    if segment_ids_bs.ndim != 2:
        raise ValueError(f"segment ids must be [b, s], not {list(segment_ids_bs.shape)}")
    b, s = segment_ids_bs.shape
    position_s = torch.arange(s, device=segment_ids_bs.device)
    edge_bs = torch.ones(b, s + 1, dtype=torch.bool, device=segment_ids_bs.device)
    edge_bs[:, 1:s] = segment_ids_bs[:, 1:] != segment_ids_bs[:, :-1]
    valid_bs = segment_ids_bs >= 0

    # Only the first token of each run keeps its id, so an id that occurs twice is two runs.
    opening_bs = torch.where(edge_bs[:, :-1] & valid_bs, segment_ids_bs, -1).sort(dim=1).values
    if ((opening_bs[:, 1:] == opening_bs[:, :-1]) & (opening_bs[:, 1:] >= 0)).any():
        raise ValueError("each segment id must be one contiguous run within its sequence")

    start_bs = torch.where(edge_bs[:, :-1], position_s, 0).cummax(dim=1).values
    closing_bs = torch.where(edge_bs[:, 1:], position_s + 1, s)
    end_bs = closing_bs.flip(1).cummin(dim=1).values.flip(1)
    return start_bs * valid_bs, end_bs * valid_bs
