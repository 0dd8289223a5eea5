"""Read a token store without loading it: its files are memory-mapped.

``data.token_store_writer`` describes the files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megalard.data.tokenizer import Tokenizer
from megalard.errors import RankError, UserError, shown
from megalard.files.reading import read_json

FORMAT, VERSION = "megalard token store", 1
TOKENS, DOCUMENTS, META = "tokens.bin", "documents.npy", "meta.json"
_FIELDS: dict[str, type] = {
    "dtype": str,
    "tokens": int,
    "documents": int,
    "vocab_size": int,
    "largest_id": int,
    "eos_id": int,
    "tokenizer": str,
    "sources": str,
}
_REMAKE = "delete it and make it again with megalard prepare"


@dataclass(frozen=True)
class TokenStore:
    """An open token store.

    Attributes:
        path: the directory of the store.
        tokens: uint16 or uint32 [tokens], memory-mapped and read-only; ``read`` checks what it
            returns.
        documents: int64 [documents + 1], memory-mapped; document i is
            ``tokens[documents[i] : documents[i + 1]]``, with its eos id.
        vocab_size: the vocabulary size of the tokenizer.
        largest_id: the largest id that occurs.
        eos_id: the id that ends every document.
        tokenizer_fingerprint: identifies the tokenizer that made the store.
        sources_fingerprint: identifies the text that the store was made from.
    """

    path: Path
    tokens: np.ndarray
    documents: np.ndarray
    vocab_size: int
    largest_id: int
    eos_id: int
    tokenizer_fingerprint: str
    sources_fingerprint: str

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Map the store at ``path`` and check its files against each other.

        Raises:
            UserError: there is no store, or it has another version, is truncated or damaged.
        """
        path = Path(path)
        meta = _read_meta(path)
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        try:
            size = (path / TOKENS).stat().st_size
            documents = np.load(path / DOCUMENTS, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"token store {path} is damaged ({error}): {_REMAKE}") from error
        if size != meta["tokens"] * dtype.itemsize:
            raise UserError(
                f"token store {path} is truncated: {TOKENS} has {size} bytes where {META} promises "
                f"{meta['tokens'] * dtype.itemsize}; {_REMAKE}"
            )
        shape = (meta["documents"] + 1,)
        if documents.dtype != np.int64 or documents.shape != shape or not _cover(documents, meta):
            raise UserError(
                f"token store {path} is damaged: {DOCUMENTS} does not divide the "
                f"{meta['tokens']} tokens into {meta['documents']} documents; {_REMAKE}"
            )
        return cls(
            path=path,
            tokens=np.memmap(path / TOKENS, dtype=dtype, mode="r"),
            documents=documents,
            vocab_size=meta["vocab_size"],
            largest_id=meta["largest_id"],
            eos_id=meta["eos_id"],
            tokenizer_fingerprint=meta["tokenizer"],
            sources_fingerprint=meta["sources"],
        )

    def head(self, tokens: int) -> TokenStore:
        """Return the store of the first ``tokens`` tokens; the last document may be cut."""
        documents = self.documents[: np.searchsorted(self.documents, tokens)]
        documents = np.concatenate([documents, [tokens]])
        return replace(self, tokens=self.tokens[:tokens], documents=documents)

    def read(self, start: int, end: int) -> np.ndarray:
        """Return a copy of the tokens from ``start`` to ``end``: int64 [end - start].

        Raises:
            RankError: an id is larger than every id that was written: the file is damaged.
        """
        tokens = self.tokens[start:end].astype(np.int64)
        if tokens.size and tokens.max() > self.largest_id:
            raise RankError(
                f"token store {self.path} is damaged: id {tokens.max()} between tokens {start} and "
                f"{end} exceeds the largest written, {self.largest_id}; {_REMAKE}"
            )
        return tokens

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a model whose tokenizer is not the tokenizer that made the store.

        Raises:
            UserError: the fingerprints or the eos ids differ.
        """
        if not tokenizer.is_known_as(self.tokenizer_fingerprint):
            raise UserError(
                f"token store {self.path} was made with the tokenizer of fingerprint "
                f"{self.tokenizer_fingerprint[:12]} but the model's is "
                f"{tokenizer.fingerprint[:12]}: tokenize again with this model"
            )
        if self.eos_id != tokenizer.eos_id:
            raise UserError(
                f"token store {self.path} ends its documents with id {self.eos_id} but the model's "
                f"eos id is {tokenizer.eos_id}: tokenize again with this model"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a model whose embedding has fewer rows than the store has ids.

        Raises:
            UserError: an id of the store is outside the model's vocabulary.
        """
        if self.largest_id >= vocab_size:
            raise UserError(
                f"token store {self.path} holds the id {self.largest_id} but the model has only "
                f"{vocab_size} rows of embedding: tokenize again with the model's own tokenizer "
                "(model.tokenizer)"
            )


def _cover(documents: np.ndarray, meta: dict) -> bool:
    """Whether the offsets increase strictly from 0 to the number of tokens."""
    return bool(
        documents[0] == 0 and documents[-1] == meta["tokens"] and np.all(np.diff(documents) > 0)
    )


def _read_meta(path: Path) -> dict:
    if not (path / META).is_file():
        raise UserError(f"{path} is not a token store (no {META}): make one with megalard prepare")
    try:
        meta: Any = read_json(path / META)
    except (OSError, ValueError) as error:
        raise UserError(f"{path / META} cannot be read ({error}): {_REMAKE}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{path / META} does not describe a token store: choose another directory")
    if meta.get("version") != VERSION:
        raise UserError(
            f"token store {path} has version {meta.get('version')} and this program reads "
            f"{VERSION}: {_REMAKE}"
        )
    for field, kind in _FIELDS.items():
        value: Any = meta.get(field)
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise UserError(f"{path / META} has {shown(value)} for {field}: {_REMAKE}")
    if meta["dtype"] not in ("uint16", "uint32") or meta["documents"] < 1:
        raise UserError(
            f"{path / META} names the dtype {meta['dtype']} and {meta['documents']} documents: "
            f"{_REMAKE}"
        )
    return meta
