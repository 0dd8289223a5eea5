"""Hashes of the passages of a text, by which copies of text in other documents are recognized."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np

# A passage ends after every word whose checksum is a multiple of this.
_MEAN_WORDS = 8
_SMALLEST_CHARACTERS = 24


def passages_of(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash (uint64) and the number of characters (int32) of each passage of a text.

    The words, in lower case, are cut after words whose checksum is a multiple of eight. The cuts
    are at the same places wherever the same words stand, however their lines are broken
    (content-defined chunking, Muthitacharoen et al., SOSP 2001). Passages of a word or two are left
    out, because they occur everywhere.
    """
    ends: dict[str, bool] = {}
    passages: list[str] = []
    words: list[str] = []
    for word in text.lower().split():
        words.append(word)
        is_end = ends.get(word)
        if is_end is None:
            is_end = ends[word] = zlib.crc32(word.encode()) % _MEAN_WORDS == 0
        if is_end:
            passages.append(" ".join(words))
            words = []
    passages.append(" ".join(words))
    kept = [passage for passage in passages if len(passage) >= _SMALLEST_CHARACTERS]
    hashes = np.array([_hash(passage) for passage in kept], dtype=np.uint64)
    return hashes, np.array([len(passage) for passage in kept], dtype=np.int32)


def _hash(passage: str) -> int:
    digest = hashlib.blake2b(passage.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
