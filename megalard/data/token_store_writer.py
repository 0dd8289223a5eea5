"""Write a token store: a directory of tokenized documents that is written once.

tokens.bin       the ids of every document and its special tokens, uint16 or uint32, end to end
documents.npy    int64 [documents + 1], where each document starts and the last one ends
checksums.npy    uint32, the CRC-32 of every 65536 tokens
meta.json        counts, dtype, special tokens, checksums of the two files above, and the
                 fingerprints of the tokenizer and the text
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megalard.data import sources
from megalard.data.boundaries import Boundaries, boundaries_of
from megalard.data.document_source import DocumentSource
from megalard.data.formats import Column, text_column
from megalard.data.mixture import MixedText
from megalard.data.token_files import NOTE, TextHasChanged, TokenFiles
from megalard.data.token_store import (
    CHECKSUMS,
    DOCUMENTS,
    FORMAT,
    META,
    VERSION,
    TokenStore,
    file_crc32,
)
from megalard.data.tokenizer import Tokenizer
from megalard.errors import UserError
from megalard.files.temporary_folders import remove_abandoned, temporary_folder
from megalard.progress import byte_bar

# Enough text at a time to occupy every core, and little enough to hold in memory.
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 4_000_000


def build_store(
    paths: Iterable[str | Path],
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    column: Column | None = None,
    boundaries: Boundaries | None = None,
    weights: Sequence[float] | None = None,
    warn: Callable[[str], object] = print,
) -> TokenStore:
    """Tokenize ``paths`` into ``output``, or open ``output`` if it already is this store.

    Two stores are the same if they have the same documents, tokenizer and special tokens. The
    documents are read again only if the paths, sizes or modification times of the files differ. If
    several processes write the same directory, the first to finish provides it and the others open
    it.

    Args:
        paths: files and directories, as for ``sources.list_files``.
        output: the directory of the store; missing, empty, or this same store.
        column: where lines and rows have their document; None takes the key or column ``text``.
        boundaries: the special tokens around each document; None takes those that the tokenizer
            puts around a text.
        weights: the share of each path, as in ``mixture.MixedText``; None reads everything.
        warn: called with a sentence about files that are passed over.

    Raises:
        UserError: as ``sources.read_documents``; ``output`` contains something else or cannot be
            written.
    """
    paths = list(paths)
    column = column or text_column("text")
    text: DocumentSource = sources.Text(paths, column)
    if weights is not None:
        text = MixedText([sources.Text([path], column) for path in paths], weights)

    def total_bytes() -> int:
        passed_over = sources.survey(paths)[1]
        if passed_over is not None:
            warn(f"{passed_over.describe()} are not text that is read, and are passed over")
        return sources.total_bytes(paths)

    return open_or_write(text, tokenizer, output, boundaries, total_bytes)


def open_or_write(
    text: DocumentSource,
    tokenizer: Tokenizer,
    output: str | Path,
    boundaries: Boundaries | None = None,
    total_bytes: Callable[[], int] | None = None,
) -> TokenStore:
    """Open ``output`` if it is the store of a text, or write it; see ``build_store``.

    Args:
        total_bytes: called before the text is tokenized; returns its size for the progress bar.
    """
    output = Path(output)
    boundaries = boundaries or boundaries_of(tokenizer)
    remove_abandoned(output.absolute(), NOTE)
    existing = _open_same(output, tokenizer, boundaries, text)
    if existing is not None:
        return existing
    with byte_bar("tokenizing", total_bytes() if total_bytes else None) as advance:
        return write_store(text, tokenizer, output, boundaries, advance)


def write_store(
    text: DocumentSource,
    tokenizer: Tokenizer,
    output: str | Path,
    boundaries: Boundaries,
    advance: Callable[[int], object] | None = None,
) -> TokenStore:
    """Write the store of a text and open it.

    The store is written under a hidden name next to ``output``, ``.NAME.partial-XXXXXXXX``, and
    then renamed, so that a run that stops meanwhile leaves no ``output``. What a writer that was
    stopped has tokenized is not tokenized again.

    Raises:
        UserError: ``output`` contains something else or cannot be written; there is no document.
    """
    output = Path(output).absolute()

    def same() -> TokenStore | None:
        return _open_same(output, tokenizer, boundaries, text)

    try:
        with temporary_folder(output, NOTE) as partial:
            try:
                _write_files(text, tokenizer, partial, boundaries, advance)
            except TextHasChanged:
                (partial / NOTE).unlink()
                _write_files(text, tokenizer, partial, boundaries, advance)
            _move_into_place(partial, output, same)
        remove_abandoned(output)
    except OSError as error:
        raise UserError(
            f"token store {output} cannot be written ({error.strerror or error}): "
            "free some space or choose another directory"
        ) from error
    return TokenStore.open(output)


def _write_files(
    text: DocumentSource,
    tokenizer: Tokenizer,
    folder: Path,
    boundaries: Boundaries,
    advance: Callable[[int], object] | None,
) -> None:
    """Write the files of a store, after those that a stopped writer left in the folder.

    Raises:
        TextHasChanged: the folder has other documents.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    identity = [tokenizer.fingerprint, repr(boundaries), dtype.name]
    files = TokenFiles(folder, dtype, identity)
    with contextlib.closing(files):
        for batch in _batched(text.documents(advance)):
            documents = files.skip(batch)
            if not documents:
                continue
            encoded = tokenizer.encode_batch(documents)
            files.add(documents, [row for ids in encoded if (row := boundaries.around(ids))])
            assert files.progress.largest_id < tokenizer.vocab_size, (
                "an id is outside the vocabulary"
            )
        if not files.progress.documents:
            raise UserError("there is no document to tokenize: give files that contain text")
        offsets = files.finish()
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype.name,
        "tokens": int(offsets[-1]),
        "documents": len(offsets) - 1,
        "vocab_size": tokenizer.vocab_size,
        "largest_id": max(files.progress.largest_id, tokenizer.eos_id),
        "eos_id": tokenizer.eos_id,
        "before": list(boundaries.before),
        "after": list(boundaries.after),
        "tokenizer": tokenizer.fingerprint,
        "sources": text.content,
        "source_files": text.files,
        "origin": getattr(text, "origin", None),
        "documents_crc32": file_crc32(folder / DOCUMENTS),
        "checksums_crc32": file_crc32(folder / CHECKSUMS),
    }
    (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _move_into_place(partial: Path, output: Path, same: Callable[[], TokenStore | None]) -> None:
    try:
        # POSIX renames a directory onto a missing or an empty directory, and onto no other.
        os.rename(partial, output)
    except OSError:
        if same() is None:
            raise


def _open_same(
    output: Path, tokenizer: Tokenizer, boundaries: Boundaries, text: DocumentSource
) -> TokenStore | None:
    """Return the store at ``output`` if it is the same store, or None if nothing is there.

    Raises:
        UserError: something else is there.
    """
    try:
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return None
    except OSError as error:
        raise UserError(
            f"{output} cannot be read ({error.strerror}): choose another output directory"
        ) from error
    if not (output / META).is_file():
        raise UserError(
            f"{output} is not empty and is not a token store: choose another output directory"
        )
    store = TokenStore.open(output)
    is_same = tokenizer.has_fingerprint(store.tokenizer_fingerprint)
    if not is_same or store.eos_id != tokenizer.eos_id:
        difference = "with another tokenizer"
    elif not text.has_fingerprint(store.sources_fingerprint, store.source_files):
        difference = text.difference(store.origin)
        difference = difference or "from other text, or the text has changed since"
    else:
        store.check_boundaries(boundaries)
        return store
    raise UserError(
        f"token store {output} was made {difference}: delete it or choose another output directory"
    )
