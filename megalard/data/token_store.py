"""Read a token store without loading it: its files are memory-mapped.

``data.token_store_writer`` describes the files. Each part of the tokens is compared with its
checksum when it is first read.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megalard.data.boundaries import Boundaries
from megalard.data.tokenizer import Tokenizer
from megalard.errors import RankError, UserError, shown
from megalard.files.arrays import read_array
from megalard.files.reading import check_regular, read_json

FORMAT, VERSION = "megalard token store", 2
TOKENS, DOCUMENTS, META = "tokens.bin", "documents.npy", "meta.json"
CHECKSUMS = "checksums.npy"
# Tokens per checksum: 128 or 256 KiB, so that reading a block checks little more than the block.
TOKENS_PER_SUM = 2**16
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
# Stores of version 1 have no checksums, no BOS, and the EOS id after each document.
_NEW_FIELDS: dict[str, type] = {
    "before": list,
    "after": list,
    "source_files": str,
    "documents_crc32": int,
    "checksums_crc32": int,
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
        eos_id: the tokenizer's EOS id, with which blocks are padded.
        boundaries: the special tokens around each document.
        tokenizer_fingerprint: identifies the tokenizer that made the store.
        sources_fingerprint: identifies the content of the text that the store was made from; in
            version 1, its files.
        source_files: identifies the files by path, size and modification time.
        version: the version of the format.
        origin: the data set that the text is from, with its revision; None for files.
        checksums: uint32, the CRC-32 of every ``TOKENS_PER_SUM`` tokens; None in version 1.
    """

    path: Path
    tokens: np.ndarray
    documents: np.ndarray
    vocab_size: int
    largest_id: int
    eos_id: int
    boundaries: Boundaries
    tokenizer_fingerprint: str
    sources_fingerprint: str
    source_files: str
    version: int
    origin: dict | None
    checksums: np.ndarray | None
    _is_compared: np.ndarray | None = field(repr=False, default=None)

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
            check_regular(path / TOKENS)
            size = (path / TOKENS).stat().st_size
        except OSError as error:
            raise UserError(f"token store {path} is damaged ({error}): {_REMAKE}") from error
        if size != meta["tokens"] * dtype.itemsize:
            raise UserError(
                f"token store {path} is truncated: {TOKENS} has {size} bytes where {META} promises "
                f"{meta['tokens'] * dtype.itemsize}; {_REMAKE}"
            )
        checksums = None
        if meta["version"] > 1:
            checksums = _read_checksums(path, meta)
            _compare_file(path / DOCUMENTS, meta["documents_crc32"])
        documents = _load(path / DOCUMENTS, mmap_mode="r")
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
            boundaries=Boundaries(tuple(meta["before"]), tuple(meta["after"])),
            tokenizer_fingerprint=meta["tokenizer"],
            sources_fingerprint=meta["sources"],
            source_files=meta["source_files"],
            version=meta["version"],
            origin=origin if isinstance(origin := meta.get("origin"), dict) else None,
            checksums=checksums,
            _is_compared=None if checksums is None else np.zeros(len(checksums), bool),
        )

    def head(self, tokens: int) -> TokenStore:
        """Return the store of the first ``tokens`` tokens; the last document may be cut."""
        documents = self.documents[: np.searchsorted(self.documents, tokens)]
        documents = np.concatenate([documents, [tokens]])
        return replace(self, tokens=self.tokens[:tokens], documents=documents)

    def read(self, start: int, end: int) -> np.ndarray:
        """Return a copy of the tokens from ``start`` to ``end``: int64 [end - start].

        Raises:
            RankError: the file is damaged there: its checksum differs, or an id is larger than
                every id that was written.
        """
        self._compare(start, end)
        tokens = self.tokens[start:end].astype(np.int64)
        if tokens.size and tokens.max() > self.largest_id:
            raise RankError(
                f"token store {self.path} is damaged: id {tokens.max()} between tokens {start} and "
                f"{end} exceeds the largest written, {self.largest_id}; {_REMAKE}"
            )
        return tokens

    def _compare(self, start: int, end: int) -> None:
        """Compare the parts that hold these tokens with their checksums, once per process."""
        if self.checksums is None or self._is_compared is None:
            return
        for part in range(start // TOKENS_PER_SUM, -(-end // TOKENS_PER_SUM)):
            if self._is_compared[part]:
                continue
            first = part * TOKENS_PER_SUM
            # The tokens are those of the file, which may continue after the end of this store.
            tokens = self._file_tokens()[first : first + TOKENS_PER_SUM]
            if zlib.crc32(tokens.data) != self.checksums[part]:
                raise RankError(
                    f"token store {self.path} is damaged: {TOKENS} does not have its checksum "
                    f"between tokens {first} and {first + len(tokens)}; {_REMAKE}"
                )
            self._is_compared[part] = True

    def _file_tokens(self) -> np.ndarray:
        base = self.tokens.base
        return base if isinstance(base, np.memmap) else self.tokens

    def check_boundaries(self, boundaries: Boundaries) -> None:
        """Refuse other special tokens around documents than those that the store has.

        Raises:
            UserError: the tokens differ; the message names the setting.
        """
        for name, wanted, held in (
            ("bos", boundaries.before, self.boundaries.before),
            ("eos", boundaries.after, self.boundaries.after),
        ):
            if wanted != held:
                place = "before" if name == "bos" else "after"
                raise UserError(
                    f"token store {self.path} has the ids {list(held)} {place} each document, and "
                    f"data.{name} asks for {list(wanted)}: set data.{name} as the store was made, "
                    "or tokenize again"
                )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a model whose tokenizer is not the tokenizer that made the store.

        Raises:
            UserError: the fingerprints or the eos ids differ.
        """
        if not tokenizer.has_fingerprint(self.tokenizer_fingerprint):
            raise UserError(
                f"token store {self.path} was made with the tokenizer of fingerprint "
                f"{self.tokenizer_fingerprint[:12]} but the model's is "
                f"{tokenizer.fingerprint[:12]}: tokenize again with this model"
            )
        if self.eos_id != tokenizer.eos_id:
            raise UserError(
                f"token store {self.path} was made with the eos id {self.eos_id} but the model's "
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


def _read_checksums(path: Path, meta: dict) -> np.ndarray:
    _compare_file(path / CHECKSUMS, meta["checksums_crc32"])
    checksums = _load(path / CHECKSUMS)
    if checksums.dtype != np.uint32 or checksums.shape != (-(-meta["tokens"] // TOKENS_PER_SUM),):
        raise UserError(f"token store {path} is damaged: {CHECKSUMS} is too short; {_REMAKE}")
    return checksums


def _load(path: Path, **options: Any) -> np.ndarray:
    try:
        return read_array(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"token store {path.parent} is damaged ({error}): {_REMAKE}") from error


def _compare_file(path: Path, crc32: int) -> None:
    try:
        actual = file_crc32(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {_REMAKE}") from error
    if actual != crc32:
        raise UserError(f"{path} is damaged: it does not have its checksum; {_REMAKE}")


def file_crc32(path: Path) -> int:
    """Return the CRC-32 of a file."""
    check_regular(path)
    crc = 0
    with open(path, "rb") as file:
        while part := file.read(2**22):
            crc = zlib.crc32(part, crc)
    return crc


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
    if meta.get("version") not in (1, VERSION):
        raise UserError(
            f"token store {path} has version {shown(meta.get('version'))} and this program reads "
            f"1 and {VERSION}: {_REMAKE}"
        )
    wanted = _FIELDS if meta["version"] == 1 else {**_FIELDS, **_NEW_FIELDS}
    for name, kind in wanted.items():
        value: Any = meta.get(name)
        is_bad = type(value) is not kind or (isinstance(value, int) and value < 0)
        if is_bad or (kind is list and not all(type(id) is int for id in value)):
            raise UserError(f"{path / META} has {shown(value)} for {name}: {_REMAKE}")
    if meta["version"] == 1:
        meta |= {"before": [], "after": [meta["eos_id"]], "source_files": meta["sources"]}
    if meta["dtype"] not in ("uint16", "uint32") or meta["documents"] < 1:
        raise UserError(
            f"{path / META} names the dtype {meta['dtype']} and {meta['documents']} documents: "
            f"{_REMAKE}"
        )
    return meta
