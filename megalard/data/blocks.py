"""Cut a token store into blocks of equal length, without copying it."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import numpy as np

from megalard.data.token_store import TokenStore
from megalard.errors import UserError

# The ids of a block, int64 [context_length], and the half-open intervals of its documents in order.
# Places outside every interval are padding.
Block = tuple[np.ndarray, list[tuple[int, int]]]


class Blocks(Protocol):
    """A data set as the sampler and the loader use it.

    Attributes:
        context_length: tokens per block.
        tokens: the number of tokens in all blocks, without padding.
    """

    context_length: int
    tokens: int

    def __len__(self) -> int: ...

    def block(self, index: int) -> Block: ...


class PackedBlocks:
    """All documents end to end, cut every ``context_length`` tokens.

    A block may hold parts of several documents. The rest after the last complete block is dropped.
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
        """Return block ``index``, whose intervals cover it without a gap.

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
    """Each document by itself, cut every ``context_length`` tokens.

    The last block of a document is padded on the right with the eos id. It is left out if it has
    fewer than ``min_tokens`` tokens of the document.
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
        full_blocks, rest = np.divmod(np.diff(store.documents), context_length)
        keeps_rest = rest >= min_tokens
        # Document d has the blocks from self._first_block[d] up to self._first_block[d + 1].
        self._first_block = np.concatenate([[0], np.cumsum(full_blocks + keeps_rest)])
        self.tokens = int(full_blocks.sum() * context_length + rest[keeps_rest].sum())

    def __len__(self) -> int:
        return int(self._first_block[-1])

    def block(self, index: int) -> Block:
        """Return block ``index``, whose one interval starts at 0 and ends at the padding.

        Raises:
            IndexError: ``index`` is outside ``range(len(self))``.
            UserError: the store is damaged there.
        """
        _check_index(index, len(self))
        # A document without a block repeats an entry; the rightmost entry has the block.
        document = np.searchsorted(self._first_block, index, side="right") - 1
        number = index - self._first_block[document]
        start = int(self.store.documents[document] + number * self.context_length)
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
