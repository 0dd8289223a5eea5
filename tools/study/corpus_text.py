"""Text of several domains from what a machine carries: found, cleaned, de-duplicated and split.

Used by ``study_corpus.py``, whose help says what the domains are.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import os
import re
import site
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from tools.quickstart import stdlib_text

DOMAINS = ("python", "c", "prose", "licences")
SPLITS = ("train", "validation", "test")
# of a domain's bytes; what split_of gives of its files
SHARES = {"train": 0.88, "validation": 0.04, "test": 0.08}

C_SUFFIXES = (".h", ".hpp", ".hh", ".hxx", ".cuh", ".inl", ".c", ".cc", ".cpp", ".cxx", ".cu")
PROSE_SUFFIXES = (".rst", ".md", ".txt")
PROSE_NAMES = ("readme", "news", "changelog", "changes", "history", "faq", "todo", "metadata")
LICENCE_SUFFIXES = ("", ".lib", ".apache", ".mit", ".bsd", *PROSE_SUFFIXES)
LICENCE_NAMES = ("license", "licence", "copying", "copyright", "notice", "unlicense")
# lists and build records that look like prose by their names
NOT_PROSE = re.compile(
    r"(cmakelists|top_level|entry_points|sources|requirements|record|installed-files|namespace)",
    re.IGNORECASE,
)
SKIPPED_FOLDERS = (stdlib_text.SKIPPED_FOLDERS - {"site-packages", "dist-packages"}) | {
    "node_modules"
}
SMALLEST_BYTES, LARGEST_BYTES = 200, 1_000_000
# how much of a document, by the characters of its pieces, earlier documents may have: those of its
# own split, beyond which it is a near duplicate, and those of others
MOST_SEEN, MOST_SHARED = 0.5, 0.1
# a piece ends behind every word whose checksum is a multiple of this
_PIECE_WORDS = 8
_PIECE_CHARACTERS = 24
# candidates read for each byte wanted, as some of them are duplicates
_CANDIDATES = 2


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        domain, split: which it is of.
        source: the file, below its root; docstrings add ``#docstrings``.
        text: cleaned.
        pieces: uint64 [p], hashes of its pieces; weights: int32 [p], their characters.
    """

    domain: str
    split: str
    source: str
    text: str
    pieces: np.ndarray
    weights: np.ndarray

    @property
    def size(self) -> int:
        return len(self.text.encode())


def default_roots() -> list[Path]:
    """Where this machine keeps sources, headers and documentation, as far as they exist."""
    paths = sysconfig.get_paths()
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    roots = [paths["stdlib"], paths["purelib"], paths["platlib"], paths["include"]]
    roots += [*site.getsitepackages(), "/usr/lib/python3/dist-packages"]
    roots += ["/usr/include", "/usr/local/include", "/usr/lib/gcc", f"{cuda}/include"]
    roots += ["/usr/share/doc", "/usr/share/common-licenses"]
    return [Path(root) for root in dict.fromkeys(roots) if Path(root).is_dir()]


def split_of(source: str) -> str:
    """The split of a file, from its path alone."""
    return stdlib_text.split_of(source).replace("heldout", "test")


def domain_of(name: str) -> str | None:
    """The domain of a file, from its name alone; None where it belongs to none."""
    lowered = name.lower().removesuffix(".gz")
    stem, suffix = os.path.splitext(lowered)
    if stem.startswith(LICENCE_NAMES) and suffix in LICENCE_SUFFIXES:
        return "licences"
    if name.endswith(".gz") and not lowered.startswith(PROSE_NAMES):
        return None
    if suffix == ".py":
        return "python"
    if suffix in C_SUFFIXES:
        return "c"
    if suffix in PROSE_SUFFIXES and not NOT_PROSE.match(lowered):
        return "prose"
    return "prose" if lowered.startswith(PROSE_NAMES) and suffix in ("", ".debian") else None


def find_files(roots: list[Path]) -> dict[str, list[tuple[Path, str]]]:
    """By domain, (root, path below it) of every file, in an order that paths alone decide.

    A folder below several roots belongs to the innermost.
    """
    found: dict[str, list[tuple[Path, str]]] = {domain: [] for domain in DOMAINS}
    visited = set()
    for root in sorted({root.resolve() for root in roots}, key=lambda r: (-len(r.parts), str(r))):
        for parent, folders, names in os.walk(root):
            if parent in visited:
                folders.clear()
                continue
            visited.add(parent)
            folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and f[:1] != "."]
            for name in names:
                domain = domain_of(name)
                path = os.path.join(parent, name)
                if domain and os.path.isfile(path) and not os.path.islink(path):
                    found[domain].append((root, os.path.relpath(path, root)))
    for files in found.values():
        files.sort(key=lambda file: hashlib.sha256(file[1].encode()).digest())
    return found


def read_text(path: Path) -> str | None:
    """A file's text; None where it is too small or large, binary, or one long line."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        if not SMALLEST_BYTES <= len(raw) <= LARGEST_BYTES:
            return None
        text = raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    text = text.replace("\r\n", "\n").replace("\x00", "")
    # minified code and tables of data
    letters = sum(map(str.isalpha, text[:20_000]))
    if text.count("\n") < len(text) / 200 or letters < 0.4 * len(text[:20_000]):
        return None
    return text


_COMMENT_HEAD = re.compile(
    r"\A(?:\s*(?:/\*.*?\*/|//[^\n]*\n|#(?!\s*(?:include|if|define|pragma))[^\n]*\n))+", re.S
)


def without_header(text: str) -> str:
    """Source code without the comments it opens with, if they are a licence."""
    head = _COMMENT_HEAD.match(text)
    if head and re.search(r"copyright|licen[sc]e", head[0], re.IGNORECASE):
        return text[head.end() :].lstrip("\n")
    return text


def take_docstrings(text: str) -> tuple[str, str]:
    """Python code without its longer docstrings, and those as prose."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text, ""
    lines, prose = text.split("\n"), []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            place = node.body[0]
            if len(docstring) >= SMALLEST_BYTES:
                prose.append((place.lineno, docstring))
                for line in range(place.lineno - 1, place.end_lineno):
                    lines[line] = None
    prose.sort()
    code = "\n".join(line for line in lines if line is not None)
    return code, "\n\n".join(docstring for _, docstring in prose)


def pieces_of(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 and lengths int32 of a text's pieces.

    The words, lower case, are cut behind those whose checksum is a multiple of eight: at the same
    places wherever the same words stand, however their lines are broken (content-defined chunking,
    Muthitacharoen et al., SOSP 2001). Pieces of a word or two say nothing and are left out.
    """
    ends: dict[str, bool] = {}
    hashes, lengths, piece = [], [], []
    for word in text.lower().split():
        piece.append(word)
        end = ends.get(word)
        if end is None:
            end = ends[word] = zlib.crc32(word.encode()) % _PIECE_WORDS == 0
        if end:
            _add_piece(" ".join(piece), hashes, lengths)
            piece = []
    _add_piece(" ".join(piece), hashes, lengths)
    return np.array(hashes, dtype=np.uint64), np.array(lengths, dtype=np.int32)


def _add_piece(piece: str, hashes: list, lengths: list) -> None:
    if len(piece) >= _PIECE_CHARACTERS:
        digest = hashlib.blake2b(piece.encode(), digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "little"))
        lengths.append(len(piece))


def read_documents(domain: str, file: tuple[Path, str]) -> list[Document]:
    """What a file gives: nothing, a document, or code and the docstrings taken from it."""
    root, source = file
    text = read_text(root / source)
    if text is None:
        return []
    parts = [(domain, source, text)]
    if domain == "python":
        code, prose = take_docstrings(without_header(text))
        parts = [(domain, source, code), ("prose", f"{source}#docstrings", prose)]
    elif domain == "c":
        parts = [(domain, source, without_header(text))]
    elif source.endswith("METADATA"):
        # a package's description follows its fields
        parts = [(domain, source, text.partition("\n\n")[2])]
    elif domain == "licences":
        # by paragraphs, put together again in ``collect``: whole licences are in many files each,
        # and the tests would be left without any
        paragraphs = re.split(r"\n\s*\n", text)
        return [Document(domain, split_of(source), source, p, *pieces_of(p)) for p in paragraphs]
    return [
        Document(kind, split_of(source), name, body, *pieces_of(body))
        for kind, name, body in parts
        if len(body) >= SMALLEST_BYTES
    ]


def candidates(
    files: dict[str, list[tuple[Path, str]]], domain_bytes: int, workers: int
) -> Iterator[Document]:
    """Documents of the first files of each domain, some more bytes of each than are wanted."""
    with ProcessPoolExecutor(workers) as pool:
        for domain, ordered in files.items():
            chosen, size = [], 0
            for file in ordered:
                if size >= _CANDIDATES * domain_bytes:
                    break
                chosen.append(file)
                size += min((file[0] / file[1]).stat().st_size, LARGEST_BYTES)
            read = partial(read_documents, domain)
            for documents in pool.map(read, chosen, chunksize=max(1, len(chosen) // (8 * workers))):
                yield from documents


def without_duplicates(documents: list[Document]) -> list[Document]:
    """Documents that are not, or not in large part, in documents before them.

    The tests come first, then validation, then train; within these the order is kept. A piece
    counts as seen where an earlier document has it, whether or not that one is itself left out.
    Documents without a piece are left out.
    """
    order = sorted(documents, key=lambda document: -SPLITS.index(document.split))
    order = [document for document in order if len(document.pieces)]
    if not order:
        return []
    owner = np.repeat(np.arange(len(order)), [len(document.pieces) for document in order])
    split = np.array([SPLITS.index(document.split) for document in order])
    pieces = np.concatenate([document.pieces for document in order])
    weights = np.concatenate([document.weights for document in order]).astype(np.float64)
    # np.unique gives the first place of each value
    _, first, inverse = np.unique(pieces, return_index=True, return_inverse=True)
    origin = owner[first][inverse]
    total = np.bincount(owner, weights)
    shared = np.bincount(owner, weights * (split[origin] != split[owner])) / total
    seen = np.bincount(owner, weights * (origin < owner)) / total
    keep = (shared <= MOST_SHARED) & (seen <= MOST_SEEN)
    return [order[place] for place in np.flatnonzero(keep)]


def join_paragraphs(documents: list[Document]) -> Iterator[Document]:
    """The documents, with those that follow each other from one source as one."""
    for _, group in groupby(documents, key=lambda d: (d.domain, d.split, d.source)):
        parts = list(group)
        text = "\n\n".join(part.text for part in parts)
        if len(text) >= SMALLEST_BYTES:
            pieces, weights = (
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("pieces", "weights")
            )
            yield replace(parts[0], text=text, pieces=pieces, weights=weights)


def collect(
    roots: list[Path],
    domain_bytes: int,
    workers: int,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, dict[str, list[Document]]]:
    """By domain and split, documents of at most ``domain_bytes`` a domain in the shares above."""
    files = find_files(roots)
    say(", ".join(f"{len(found)} {domain}" for domain, found in files.items()) + " files found")
    documents = list(candidates(files, domain_bytes, workers))
    kept = without_duplicates(documents)
    say(f"{len(documents)} documents and paragraphs read, {len(kept)} of them are no duplicates")
    corpus = {domain: {split: [] for split in SPLITS} for domain in DOMAINS}
    room = {(d, s): domain_bytes * SHARES[s] for d in DOMAINS for s in SPLITS}
    for document in join_paragraphs(kept):
        place = document.domain, document.split
        if room[place] > 0:
            room[place] -= document.size
            corpus[document.domain][document.split].append(document)
    return corpus
