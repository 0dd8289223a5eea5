"""Documents of the retrieval tasks in bulk, made by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np

from megalard.data.token_store import TokenStore
from megalard.data.tokenizer import Tokenizer, load_tokenizer
from megalard.evaluation.samples import Filler, make_documents, sentence_filler, text_filler

# Tokens of one call of a worker, and tokens of the text that statements are hidden in.
_CHUNK_TOKENS, _FILLER_TOKENS = 250_000, 1_000_000
# Far enough apart that the chunks of two seeds are different.
_SEED_STEP = 1_000_003


def generate(
    tokenizer: Path,
    stores: list[Path],
    seed: int,
    window: int,
    tokens: int,
    map_in_parallel: Callable = map,
) -> Iterator[np.ndarray]:
    """Yield documents of ``window / 8`` to ``window`` tokens, uint32, ``tokens`` of them in all.

    They depend on the tokenizer, the stores, the seed and the window alone.

    Args:
        tokenizer: the directory of the tokenizer.
        stores: token stores; every other document hides its statements in their text.
        map_in_parallel: as ``tools.study.workers.parallel_map`` yields it.

    Raises:
        UserError: a task does not fit into the window.
    """
    chunks = -(-tokens // _CHUNK_TOKENS)
    work = partial(_make_chunk, tokenizer, stores, window)
    for documents in map_in_parallel(work, range(seed * _SEED_STEP, seed * _SEED_STEP + chunks)):
        for document in documents:
            if tokens <= 0:
                return
            yield document
            tokens -= len(document) + 1


def _make_chunk(tokenizer: Path, stores: list[Path], window: int, seed: int) -> list[np.ndarray]:
    """Return documents of about ``_CHUNK_TOKENS`` tokens, counting an end token for each."""
    encoder, fillers = _prepare(tokenizer, tuple(stores))
    documents: list[np.ndarray] = []
    tokens = 0
    for document in make_documents(encoder, seed, window // 8, window, fillers):
        documents.append(document.astype(np.uint32))
        tokens += len(document) + 1
        if tokens >= _CHUNK_TOKENS:
            break
    return documents


@cache
def _prepare(tokenizer: Path, stores: tuple[Path, ...]) -> tuple[Tokenizer, list[Filler]]:
    """Return the tokenizer and the fillers that a worker needs for all of its chunks."""
    encoder, share = load_tokenizer(tokenizer), _FILLER_TOKENS // len(stores)
    opened = [TokenStore.open(path) for path in stores]
    text = np.concatenate([store.read(0, min(share, len(store.tokens))) for store in opened])
    return encoder, [sentence_filler(encoder), text_filler(encoder, text)]
