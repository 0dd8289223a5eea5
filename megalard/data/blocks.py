"""The token store cut into sequences of equal length, without copying it.

Both kinds offer ``len()``, ``context_length``, ``tokens`` (how many the blocks hold) and
``block(i)``.
"""

from itertools import pairwise
from typing import Protocol

import numpy as np

from megalard.data.token_store import TokenStore
from megalard.errors import UserError

# A block: its ids, int64 [context_length], and the half-open intervals of its documents in order.
# Positions outside every interval are padding.
Block = tuple[np.ndarray, list[tuple[int, int]]]


class Blocks(Protocol):
    """What the sampler and the loader need of a data set."""

    context_length: int
    tokens: int

    def __len__(self) -> int: ...

    def block(self, index: int) -> Block: ...


class PackedBlocks:
    """All documents end to end, cut every ``context_length`` tokens; the last part is dropped.

    A block holds the ends, wholes and beginnings of several documents, and says where each lies.
    """

    def __init__(self, store: TokenStore, context_length: int):
        _check_context_length(context_length)
        self.store = store
        self.context_length = context_length
        self._count = len(store.tokens) // context_length
        self.tokens = self._count * context_length

    def __len__(self) -> int:
        return self._count

    def block(self, index: int) -> Block:
        """Block ``index``; the intervals cover it without a gap.

        Raises:
            IndexError: ``index`` is outside ``range(len(self))``.
            UserError: the store is damaged there.
        """
        _check_index(index, len(self))
        start = index * self.context_length
        end = start + self.context_length
        offsets = self.store.documents
        first = np.searchsorted(offsets, start, side="right") - 1
        last = np.searchsorted(offsets, end, side="left")
        bounds = (offsets[first : last + 1].clip(start, end) - start).tolist()
        return self.store.read(start, end), list(pairwise(bounds))


class DocumentBlocks:
    """Every document by itself, cut into pieces of at most ``context_length`` tokens.

    A document's last piece is padded on the right with the eos id, and left out where it has fewer
    than ``min_tokens`` tokens.
    """

    def __init__(self, store: TokenStore, context_length: int, min_tokens: int = 2):
        _check_context_length(context_length)
        if not 1 <= min_tokens <= context_length:
            raise UserError(
                f"min_tokens is {min_tokens}: set it between 1 and the context length, "
                f"{context_length}"
            )
        self.store = store
        self.context_length = context_length
        whole, rest = np.divmod(np.diff(store.documents), context_length)
        kept = rest >= min_tokens
        # Document d owns the blocks from self._first[d] up to self._first[d + 1].
        self._first = np.concatenate([[0], np.cumsum(whole + kept)])
        self.tokens = int(whole.sum() * context_length + rest[kept].sum())

    def __len__(self) -> int:
        return int(self._first[-1])

    def block(self, index: int) -> Block:
        """Block ``index``; its one interval starts at 0 and leaves out the padding.

        Raises:
            IndexError: ``index`` is outside ``range(len(self))``.
            UserError: the store is damaged there.
        """
        _check_index(index, len(self))
        # Documents without a block repeat an entry; the rightmost is the one that owns the block.
        document = np.searchsorted(self._first, index, side="right") - 1
        piece = index - self._first[document]
        start = int(self.store.documents[document] + piece * self.context_length)
        end = min(start + self.context_length, int(self.store.documents[document + 1]))
        tokens = np.full(self.context_length, self.store.eos_id, np.int64)
        tokens[: end - start] = self.store.read(start, end)
        return tokens, [(0, end - start)]


def _check_context_length(context_length: int) -> None:
    if context_length < 2:
        raise UserError(f"the context length is {context_length}: set it to 2 tokens or more")


def _check_index(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise IndexError(f"block {index} of {count}")
