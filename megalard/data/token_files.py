"""The growing files of a token store, and how far their writer got.

From time to time the writer notes how many documents it has read and written. If it is stopped, the
next writer reads these documents again, which is fast, but does not tokenize them again.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalard.data.document_source import DocumentDigest
from megalard.data.token_store import CHECKSUMS, DOCUMENTS, TOKENS, TOKENS_PER_SUM
from megalard.files.reading import read_json
from megalard.files.writing import replace_text

NOTE = "progress.json"
_LENGTHS = "lengths.bin"
_SECONDS_PER_NOTE = 5.0


@dataclass
class Progress:
    """How far a writer got.

    Attributes:
        identity: identifies the text, the tokenizer and the special tokens.
        documents_read: documents of the text, of which some may have no token.
        digest: a sha256 of these documents.
        documents, tokens: what the files hold of them.
        largest_id: the largest id of them.
        sums: the CRC-32 of every ``TOKENS_PER_SUM`` tokens.
        crc, tokens_after_sums: the CRC-32 and the number of the tokens after these.
    """

    identity: list[str]
    documents_read: int = 0
    digest: str = ""
    documents: int = 0
    tokens: int = 0
    largest_id: int = 0
    sums: list[int] = field(default_factory=list)
    crc: int = 0
    tokens_after_sums: int = 0


class TokenFiles:
    """Writes the tokens and the lengths of documents into a folder.

    Args:
        folder: the folder, which may have the files of a writer that was stopped.
        dtype: dtype of the tokens.
        identity: as in ``Progress``. Files of another identity are written anew.
    """

    def __init__(self, folder: Path, dtype: np.dtype, identity: list[str]):
        self._folder, self._dtype = folder, dtype
        self._digest, self._noted_at = DocumentDigest(), time.monotonic()
        self.progress = _noted(folder, identity, dtype) or Progress(identity)
        self._start = self.progress.documents_read
        self._tokens = _opened(folder / TOKENS, self.progress.tokens * dtype.itemsize)
        self._lengths = _opened(folder / _LENGTHS, self.progress.documents * 8)
        self._seen = 0

    def skip(self, documents: Sequence[str]) -> list[str]:
        """Return the documents that are not written yet; to be called with all in their order.

        Raises:
            TextHasChanged: the documents that are written are other documents.
        """
        left = max(0, self._start - self._seen)
        for document in documents[:left]:
            self._add_to_digest(document)
        if left and self._seen == self._start and self._digest.hexdigest() != self.progress.digest:
            raise TextHasChanged
        return list(documents[left:])

    def add(self, documents: Sequence[str], rows: list[list[int]]) -> None:
        """Write the tokens of the next documents.

        Args:
            documents: the documents that were read.
            rows: the ids of those that have any, with special tokens.
        """
        for document in documents:
            self._add_to_digest(document)
        if rows:
            lengths = np.fromiter(map(len, rows), np.int64, len(rows))
            ids = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
            tokens = ids.astype(self._dtype)
            self._tokens.write(tokens.data)
            self._lengths.write(lengths.astype("<i8").data)
            self.progress.documents += len(rows)
            self.progress.tokens += len(tokens)
            self.progress.largest_id = max(self.progress.largest_id, int(ids.max()))
            self._sum(tokens)
        self.progress.documents_read = self._seen
        if time.monotonic() - self._noted_at > _SECONDS_PER_NOTE:
            self._note()

    def finish(self) -> np.ndarray:
        """Write the offsets and the checksums; return the offsets, int64 [documents + 1].

        Raises:
            TextHasChanged: the text has fewer documents than are written.
        """
        if self._seen < self._start:
            raise TextHasChanged
        self._tokens.close()
        self._lengths.close()
        lengths = np.fromfile(self._folder / _LENGTHS, "<i8")
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
        if self.progress.tokens_after_sums:
            self.progress.sums.append(self.progress.crc)
        np.save(self._folder / DOCUMENTS, offsets)
        np.save(self._folder / CHECKSUMS, np.array(self.progress.sums, np.uint32))
        # The note first: a folder that has a note has the files that it speaks of.
        (self._folder / NOTE).unlink(missing_ok=True)
        (self._folder / _LENGTHS).unlink()
        return offsets

    def close(self) -> None:
        """Close the files."""
        self._tokens.close()
        self._lengths.close()

    def _add_to_digest(self, document: str) -> None:
        self._digest.add(document)
        self._seen += 1

    def _sum(self, tokens: np.ndarray) -> None:
        progress = self.progress
        while len(tokens):
            part = tokens[: TOKENS_PER_SUM - progress.tokens_after_sums]
            progress.crc = zlib.crc32(part.data, progress.crc)
            progress.tokens_after_sums += len(part)
            tokens = tokens[len(part) :]
            if progress.tokens_after_sums == TOKENS_PER_SUM:
                progress.sums.append(progress.crc)
                progress.crc = progress.tokens_after_sums = 0

    def _note(self) -> None:
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        self.progress.digest = self._digest.hexdigest()
        replace_text(self._folder / NOTE, json.dumps(asdict(self.progress)))
        self._noted_at = time.monotonic()


class TextHasChanged(Exception):
    """The text is not the text of which a writer has written the first documents."""


def _noted(folder: Path, identity: list[str], dtype: np.dtype) -> Progress | None:
    """Return what a writer of the same identity noted, if its files have that much."""
    try:
        progress = Progress(**read_json(folder / NOTE))
        has_tokens = (folder / TOKENS).stat().st_size >= progress.tokens * dtype.itemsize
        has_lengths = (folder / _LENGTHS).stat().st_size >= progress.documents * 8
    except (OSError, ValueError, TypeError):
        return None
    is_complete = has_tokens and has_lengths
    return progress if is_complete and progress.identity == identity else None


def _opened(path: Path, size: int) -> BinaryIO:
    """Open a file to go on after ``size`` bytes."""
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
    file.truncate(size)
    file.seek(size)
    return file
