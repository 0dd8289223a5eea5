"""The bytes that the sharded relation sends, by formula."""

from __future__ import annotations

from megalard.distill.terms.sharded_relations import Traffic
from megalard.parallel.context.schedule import difference_cover


def expected_traffic(ranks: int, chunk_bytes: int, row_bytes: int) -> Traffic:
    """Return what one rank sends for one layer of teacher and student of the same width.

    Args:
        chunk_bytes: bytes of the student's vectors in one chunk, over all operands.
        row_bytes: bytes of one fp32 number for every row of the whole blocks and every head, summed
            over the relations.
    """
    if ranks == 1:
        return Traffic()
    fetches = len(difference_cover(ranks)) - 1
    return Traffic(2 * fetches * chunk_bytes, fetches * chunk_bytes, 5 * row_bytes)
