"""Documents of text from the files of a machine, sorted into domains and cleaned.

``tools.study.corpus`` lists the domains.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.quickstart import stdlib_text
from tools.study.passages import passages_of

DOMAINS = ("python", "c", "prose", "licenses")
SPLITS = ("train", "validation", "test")

_C_SUFFIXES = (".h", ".hpp", ".hh", ".hxx", ".cuh", ".inl", ".c", ".cc", ".cpp", ".cxx", ".cu")
_PROSE_SUFFIXES = (".rst", ".md", ".txt")
_PROSE_NAMES = ("readme", "news", "changelog", "changes", "history", "faq", "todo", "metadata")
_LICENSE_SUFFIXES = ("", ".lib", ".apache", ".mit", ".bsd", *_PROSE_SUFFIXES)
_LICENSE_NAMES = ("license", "licence", "copying", "copyright", "notice", "unlicense")
# Lists and build records whose names look like names of prose.
_NOT_PROSE = re.compile(
    r"(cmakelists|top_level|entry_points|sources|requirements|record|installed-files|namespace)",
    re.IGNORECASE,
)
_SKIPPED_FOLDERS = (stdlib_text.SKIPPED_FOLDERS - {"site-packages", "dist-packages"}) | {
    "node_modules"
}
SMALLEST_BYTES, LARGEST_BYTES = 200, 1_000_000


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        domain, split: where it belongs.
        source: the path of its file below the root; docstrings add ``#docstrings``.
        text: the cleaned text.
        passages: uint64 [p], a hash of each passage of the text.
        weights: int32 [p], the number of characters of each passage.
    """

    domain: str
    split: str
    source: str
    text: str
    passages: np.ndarray
    weights: np.ndarray

    @property
    def size(self) -> int:
        """The number of bytes of the text."""
        return len(self.text.encode())


def default_roots() -> list[Path]:
    """Return the directories in which a machine keeps sources, headers and documentation."""
    paths = sysconfig.get_paths()
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    roots = [paths["stdlib"], paths["purelib"], paths["platlib"], paths["include"]]
    roots += [*site.getsitepackages(), "/usr/lib/python3/dist-packages"]
    roots += ["/usr/include", "/usr/local/include", "/usr/lib/gcc", f"{cuda}/include"]
    roots += ["/usr/share/doc", "/usr/share/common-licenses"]
    return [Path(root) for root in dict.fromkeys(roots) if Path(root).is_dir()]


def split_of(source: str) -> str:
    """Return the split of a file, which depends on its path alone."""
    return stdlib_text.split_of(source).replace("heldout", "test")


def domain_of(name: str) -> str | None:
    """Return the domain of a file by its name; None if it belongs to none."""
    lowered = name.lower().removesuffix(".gz")
    stem, suffix = os.path.splitext(lowered)
    if stem.startswith(_LICENSE_NAMES) and suffix in _LICENSE_SUFFIXES:
        return "licenses"
    if name.endswith(".gz") and not lowered.startswith(_PROSE_NAMES):
        return None
    if suffix == ".py":
        return "python"
    if suffix in _C_SUFFIXES:
        return "c"
    if suffix in _PROSE_SUFFIXES and not _NOT_PROSE.match(lowered):
        return "prose"
    return "prose" if lowered.startswith(_PROSE_NAMES) and suffix in ("", ".debian") else None


def find_files(roots: list[Path]) -> dict[str, list[tuple[Path, str]]]:
    """Return root and path below it of every file, by domain, in an order that depends on paths.

    A directory below several roots belongs to the innermost root.
    """
    files: dict[str, list[tuple[Path, str]]] = {domain: [] for domain in DOMAINS}
    visited = set()
    for root in sorted({root.resolve() for root in roots}, key=lambda r: (-len(r.parts), str(r))):
        for parent, folders, names in os.walk(root):
            if parent in visited:
                folders.clear()
                continue
            visited.add(parent)
            folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and f[:1] != "."]
            for name in names:
                domain = domain_of(name)
                path = os.path.join(parent, name)
                if domain and os.path.isfile(path) and not os.path.islink(path):
                    files[domain].append((root, os.path.relpath(path, root)))
    for of_domain in files.values():
        of_domain.sort(key=lambda file: hashlib.sha256(file[1].encode()).digest())
    return files


def read_text(path: Path) -> str | None:
    """Return the text of a file; None if it is too small, too large or not text.

    Minified code and tables of numbers do not count as text.
    """
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
    letters = sum(map(str.isalpha, text[:20_000]))
    if text.count("\n") < len(text) / 200 or letters < 0.4 * len(text[:20_000]):
        return None
    return text


_OPENING_COMMENT = re.compile(
    r"\A(?:\s*(?:/\*.*?\*/|//[^\n]*\n|#(?!\s*(?:include|if|define|pragma))[^\n]*\n))+", re.DOTALL
)


def without_license(text: str) -> str:
    """Return source code without its opening comment, if that is a license."""
    comment = _OPENING_COMMENT.match(text)
    if comment and re.search(r"copyright|licen[sc]e", comment[0], re.IGNORECASE):
        return text[comment.end() :].lstrip("\n")
    return text


def take_docstrings(text: str) -> tuple[str, str]:
    """Return Python code without its longer docstrings, and these docstrings as prose."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text, ""
    lines: list[str | None] = list(text.split("\n"))
    prose = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            statement = node.body[0]
            if len(docstring) >= SMALLEST_BYTES:
                prose.append((statement.lineno, docstring))
                for number in range(statement.lineno - 1, statement.end_lineno):
                    lines[number] = None
    prose.sort()
    code = "\n".join(line for line in lines if line is not None)
    return code, "\n\n".join(docstring for _, docstring in prose)


def read_documents(domain: str, file: tuple[Path, str]) -> list[Document]:
    """Return the documents of a file: none, one, or its code and the docstrings taken from it.

    A license becomes one document per paragraph, because whole licenses are in many files, and the
    tests would be left without any. ``tools.study.collection`` joins the paragraphs that remain.
    """
    root, source = file
    text = read_text(root / source)
    if text is None:
        return []
    split = split_of(source)
    if domain == "licenses":
        paragraphs = re.split(r"\n\s*\n", text)
        return [Document(domain, split, source, p, *passages_of(p)) for p in paragraphs]
    parts = [(domain, source, text)]
    if domain == "python":
        code, prose = take_docstrings(without_license(text))
        parts = [(domain, source, code), ("prose", f"{source}#docstrings", prose)]
    elif domain == "c":
        parts = [(domain, source, without_license(text))]
    elif source.endswith("METADATA"):
        # The description of a package follows its fields.
        parts = [(domain, source, text.partition("\n\n")[2])]
    return [
        Document(kind, split, name, body, *passages_of(body))
        for kind, name, body in parts
        if len(body) >= SMALLEST_BYTES
    ]
