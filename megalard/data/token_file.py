"""The token store: a folder of tokenized documents, written once and memory-mapped.

``tokens.bin``      every document's ids and its eos id, uint16 or uint32, end to end
``documents.npy``   int64 ``[documents + 1]``, where each document starts and the last one ends
``meta.json``       counts, dtype, and the fingerprints of the tokenizer and the sources
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megalard.data import sources
from megalard.data.token_store import DOCUMENTS, FORMAT, META, TOKENS, VERSION, TokenStore
from megalard.data.tokenizer import Tokenizer
from megalard.errors import UserError

# Enough text at a time to occupy every core, little enough to hold in memory.
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 4_000_000


def build_store(
    paths: Iterable[str | Path],
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    text_key: str = "text",
    progress: bool = True,
) -> TokenStore:
    """Tokenizes ``paths`` into ``output``, or opens ``output`` if it already holds just that.

    A store is the same when the paths, sizes and modification times of its sources, the text key
    and the tokenizer are. Of several processes building one folder, the first to finish provides
    it and the others open that.

    Args:
        paths: files and folders, as for ``sources.list_files``.
        output: the store's folder; missing, empty, or this same store.
        progress: draw a bar on stderr when it is a terminal.

    Raises:
        UserError: as ``sources.read_documents``; ``output`` holds something else or cannot be
            written.
    """
    paths, output = list(paths), Path(output)
    source = sources.fingerprint(paths, text_key)
    existing = _open_same(output, tokenizer, source)
    if existing is not None:
        return existing
    console = Console(stderr=True)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("", total=sources.total_bytes(paths))
        documents = sources.read_documents(paths, text_key, lambda size: bar.advance(task, size))
        return write_store(documents, tokenizer, output, source)


def write_store(
    documents: Iterable[str], tokenizer: Tokenizer, output: str | Path, source: str
) -> TokenStore:
    """Writes the store of ``documents`` and opens it; ``source`` is what identifies them.

    The store is written beside ``output`` under a hidden name and renamed into place, so that a
    run that stops on the way leaves no ``output``. A killed process may leave the hidden folder
    (``.<name>.partial-…``), which nothing reads and anybody may delete.

    Raises:
        UserError: ``output`` holds something else or cannot be written; there is no document.
    """
    output = Path(output).absolute()
    partial = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        _write_files(documents, tokenizer, partial, source)
        _move_into_place(partial, output, lambda: _open_same(output, tokenizer, source))
    except OSError as error:
        raise UserError(
            f"token store {output} cannot be written ({error.strerror or error}): "
            "free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenStore.open(output)


def _write_files(documents: Iterable[str], tokenizer: Tokenizer, folder: Path, source: str) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    lengths = []
    largest = tokenizer.eos_id
    with open(folder / TOKENS, "wb") as file:
        for texts in _batched(documents):
            rows = tokenizer.encode_batch(texts)
            for row in rows:
                row.append(tokenizer.eos_id)
            lengths.append(np.fromiter(map(len, rows), np.int64, len(rows)))
            ids = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths[-1].sum()))
            largest = max(largest, int(ids.max()))
            assert largest < tokenizer.vocab_size, "the tokenizer gave an id outside its vocabulary"
            file.write(ids.astype(dtype).data)
    if not lengths:
        raise UserError("there is no document to tokenize: give some text")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype("<i8")
    np.save(folder / DOCUMENTS, offsets)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype.name,
        "tokens": int(offsets[-1]),
        "documents": len(offsets) - 1,
        "vocab_size": tokenizer.vocab_size,
        "largest_id": largest,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.fingerprint,
        "sources": source,
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
        # POSIX renames onto a missing or an empty folder, and onto no other.
        os.rename(partial, output)
    except OSError:
        if same() is None:
            raise


def _open_same(output: Path, tokenizer: Tokenizer, source: str) -> TokenStore | None:
    """The store at ``output`` if it is the wanted one; None if nothing is there.

    Raises:
        UserError: something else is there.
    """
    try:
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return None
    except OSError as error:
        raise UserError(
            f"{output} cannot be read ({error.strerror}): choose another output folder"
        ) from error
    if not (output / META).is_file():
        raise UserError(
            f"{output} is not empty and holds no token store: choose another output folder"
        )
    store = TokenStore.open(output)
    if store.tokenizer_fingerprint != tokenizer.fingerprint or store.eos_id != tokenizer.eos_id:
        other = "with another tokenizer"
    elif store.sources_fingerprint != source:
        other = "from other sources, or they have changed since"
    else:
        return store
    raise UserError(
        f"token store {output} was made {other}: delete it or choose another output folder"
    )
