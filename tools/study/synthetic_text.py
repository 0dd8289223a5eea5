"""Documents of the retrieval tasks in bulk, by several processes; used by ``study_corpus.py``."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np

from megalard.data.token_store import TokenStore
from megalard.data.tokenizer import Tokenizer, load_tokenizer
from megalard.evaluation.tasks import Filler, make_documents, sentence_filler, text_filler

# of one call of a worker, and of text that statements are hidden in
CHUNK_TOKENS, FILLER_TOKENS = 250_000, 1_000_000


def generate(
    tokenizer: Path, stores: list[Path], seed: int, native: int, tokens: int, workers: int
) -> Iterator[np.ndarray]:
    """Documents of ``native / 8`` to ``native`` tokens, until there are ``tokens`` of them.

    They depend on the tokenizer, the stores, the seed and the length, not on the workers.

    Args:
        tokenizer: its folder.
        stores: token stores, whose text is hidden in by every other document.

    Raises:
        UserError: ``native`` does not hold a task.
    """
    chunks = -(-tokens // CHUNK_TOKENS)
    # not forked from a process in which the tokenizer's threads have run
    context = multiprocessing.get_context("spawn")
    work = partial(make_chunk, tokenizer, stores, native)
    with ProcessPoolExecutor(min(workers, chunks), mp_context=context) as pool:
        for documents in pool.map(work, range(seed * 1_000_003, seed * 1_000_003 + chunks)):
            for document in documents:
                if tokens <= 0:
                    return
                yield document
                tokens -= len(document) + 1


def make_chunk(tokenizer: Path, stores: list[Path], native: int, seed: int) -> list[np.ndarray]:
    """Some ``CHUNK_TOKENS`` of documents, uint32, their end tokens counted."""
    encoder, fillers = _prepare(tokenizer, tuple(stores))
    documents, left = [], CHUNK_TOKENS
    for document in make_documents(encoder, seed, native // 8, native, fillers):
        documents.append(document.astype(np.uint32))
        left -= len(document) + 1
        if left <= 0:
            return documents


@cache
def _prepare(tokenizer: Path, stores: tuple[Path, ...]) -> tuple[Tokenizer, list[Filler]]:
    """What a worker needs for all of its chunks."""
    encoder, share = load_tokenizer(tokenizer), FILLER_TOKENS // len(stores)
    opened = [TokenStore.open(path) for path in stores]
    text = np.concatenate([store.read(0, min(share, len(store.tokens))) for store in opened])
    return encoder, [sentence_filler(encoder), text_filler(encoder, text)]
