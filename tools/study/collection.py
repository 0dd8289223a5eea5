"""Documents of all domains from the files of a machine, without copies, divided into splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from tools.study.documents import (
    DOMAINS,
    LARGEST_BYTES,
    SMALLEST_BYTES,
    SPLITS,
    Document,
    find_files,
    read_documents,
)
from tools.study.workers import parallel_map

# Shares of the bytes of a domain, as ``split_of`` divides its files.
_SHARES = {"train": 0.88, "validation": 0.04, "test": 0.08}
# The largest share of a document, by characters, that earlier documents of the same split may have,
# and the largest share that documents of other splits may have.
_MOST_SEEN, _MOST_SHARED = 0.5, 0.1
# Bytes that are read for each byte of the result, because some documents are copies.
_CANDIDATES = 2

Corpus = dict[str, dict[str, list[Document]]]
"""Domain to split to documents."""


def collect(
    roots: list[Path],
    domain_bytes: int,
    workers: int,
    report: Callable[[str], object] = lambda line: None,
) -> Corpus:
    """Return documents of at most ``domain_bytes`` per domain, in the shares of the splits.

    Args:
        report: called with a line about each finished part.
    """
    files = find_files(roots)
    report(", ".join(f"{len(paths)} {domain}" for domain, paths in files.items()) + " files")
    documents = list(_candidates(files, domain_bytes, workers))
    kept = without_copies(documents)
    report(f"{len(documents)} documents and paragraphs were read, {len(kept)} of them not copies")
    corpus: Corpus = {domain: {split: [] for split in SPLITS} for domain in DOMAINS}
    room = {(d, s): domain_bytes * _SHARES[s] for d in DOMAINS for s in SPLITS}
    for document in join_paragraphs(kept):
        place = document.domain, document.split
        if room[place] > 0:
            room[place] -= document.size
            corpus[document.domain][document.split].append(document)
    return corpus


def _candidates(
    files: dict[str, list[tuple[Path, str]]], domain_bytes: int, workers: int
) -> Iterator[Document]:
    """Yield the documents of the first files of each domain, more than the result needs."""
    with parallel_map(workers) as map_in_parallel:
        for domain, ordered in files.items():
            chosen, size = [], 0
            for file in ordered:
                if size >= _CANDIDATES * domain_bytes:
                    break
                chosen.append(file)
                size += min((file[0] / file[1]).stat().st_size, LARGEST_BYTES)
            read = partial(read_documents, domain)
            chunksize = max(1, len(chosen) // (8 * workers))
            for documents in map_in_parallel(read, chosen, chunksize=chunksize):
                yield from documents


def without_copies(documents: list[Document]) -> list[Document]:
    """Return the documents that share no large part with earlier documents.

    The test documents come first, then validation, then train; within a split the order is kept. A
    passage counts as seen if an earlier document has it, even if that document is left out.
    Documents without a passage are left out.
    """
    order = sorted(documents, key=lambda document: -SPLITS.index(document.split))
    order = [document for document in order if len(document.passages)]
    if not order:
        return []
    owner = np.repeat(np.arange(len(order)), [len(document.passages) for document in order])
    split = np.array([SPLITS.index(document.split) for document in order])
    passages = np.concatenate([document.passages for document in order])
    weights = np.concatenate([document.weights for document in order]).astype(np.float64)
    # np.unique returns the first place of each value.
    _, first_place, inverse = np.unique(passages, return_index=True, return_inverse=True)
    origin = owner[first_place][inverse]
    total = np.bincount(owner, weights)
    shared = np.bincount(owner, weights * (split[origin] != split[owner])) / total
    seen = np.bincount(owner, weights * (origin < owner)) / total
    keep = (shared <= _MOST_SHARED) & (seen <= _MOST_SEEN)
    return [order[place] for place in np.flatnonzero(keep)]


def join_paragraphs(documents: list[Document]) -> Iterator[Document]:
    """Yield the documents; documents of one source that follow each other become one."""
    for _, group in groupby(documents, key=lambda d: (d.domain, d.split, d.source)):
        parts = list(group)
        text = "\n\n".join(part.text for part in parts)
        if len(text) >= SMALLEST_BYTES:
            passages = np.concatenate([part.passages for part in parts])
            weights = np.concatenate([part.weights for part in parts])
            yield replace(parts[0], text=text, passages=passages, weights=weights)
