"""Make the text of a study from directories on this machine, with the model's own tokenizer.

  python -m tools.study.pretrained.corpus --model STUDY/teacher --output STUDY/corpus \
      --domain manuals=DIR --domain manuals=DIR --domain news=DIR

Files ending in .txt, .md, .rst, .pod, .html, .htm (also .gz) are read; tags are taken out of HTML.
The files of one directory are one document, in the order of their names, since the pages of a
manual belong together. Documents are cut after half a megabyte. A tenth of each domain is for
tests, a twentieth for validation, and the rest for training. Each document is in one split only.

  OUTPUT/DOMAIN/{train,validation,test}/   token stores, for data.paths and evaluation.paths
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from megalard import cli
from megalard.errors import UserError
from tools import command_line

CORPUS = "corpus.json"
_SUFFIXES = (".txt", ".md", ".rst", ".pod", ".html", ".htm")
_LARGEST_CHARACTERS, _SMALLEST_CHARACTERS = 2**19, 2**10
# The shares of a domain that are not for training.
SHARES = {"test": 0.10, "validation": 0.05}


def main(arguments: list[str] | None = None) -> int:
    """Make the corpus; return the exit status."""
    parser = command_line.make_parser("tools.study.pretrained.corpus", __doc__)
    command_line.add_output(parser, "where the domains are written")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="the model with its tokenizer"
    )
    parser.add_argument(
        "--domain",
        action="append",
        required=True,
        type=_domain,
        metavar="NAME=DIR",
        help="a directory of text of a domain; may be repeated",
    )
    parser.add_argument(
        "--end-token",
        metavar="TEXT",
        help="the token that ends a document, where it is not the tokenizer's EOS",
    )
    options = parser.parse_args(arguments)
    return cli.run(lambda: run(options))


def _domain(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not re.fullmatch(r"[a-z0-9_-]+", name) or not path or not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not NAME=DIR with a directory that exists")
    return name, Path(path)


def run(options: argparse.Namespace) -> None:
    """Make the token stores of all domains and print their sizes."""
    from megalard.data.tokenizer import load_tokenizer
    from tools.study.corpus_stores import write_texts

    tokenizer = load_tokenizer(options.model)
    for name in dict.fromkeys(name for name, _ in options.domain):
        folders = [folder for domain, folder in options.domain if domain == name]
        splits = divide([text for folder in folders for text in documents(folder)])
        for split, texts in splits.items():
            if not texts:
                raise UserError(f"the domain {name} has too little text for {split}: give more")
            folder = options.output / name / split
            store = write_texts(texts, tokenizer, folder, options.end_token)
            print(
                f"{name}/{split}: {len(texts)} documents, {len(store.tokens):,} tokens", flush=True
            )
    (options.output / CORPUS).write_text(json.dumps({"end_token": options.end_token}) + "\n")


def documents(folder: Path) -> Iterator[str]:
    """Yield the documents of a directory and its subdirectories."""
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*"), key=_natural_order):
        if path.is_file() and not path.is_symlink() and _kind(path) in _SUFFIXES:
            by_folder.setdefault(path.parent, []).append(path)
    for paths in by_folder.values():
        names = {_stem(path) for path in paths if _kind(path) not in (".html", ".htm")}
        # A page that is also there as plain text is read once.
        pages = [p for p in paths if _kind(p) not in (".html", ".htm") or _stem(p) not in names]
        yield from cut("\n\n".join(filter(None, map(read_page, pages))))


def cut(text: str) -> Iterator[str]:
    """Yield a text in parts that end with a paragraph, without a short rest."""
    while len(text) >= _SMALLEST_CHARACTERS:
        end = len(text)
        if end > _LARGEST_CHARACTERS:
            end = text.rfind("\n\n", _LARGEST_CHARACTERS // 2, _LARGEST_CHARACTERS)
            end = _LARGEST_CHARACTERS if end < 0 else end
        yield text[:end]
        text = text[end:].lstrip()


def divide(texts: list[str]) -> dict[str, list[str]]:
    """Divide documents by their checksums into the splits, in the shares of ``SHARES``."""
    unique = dict.fromkeys(texts)
    ordered = sorted(unique, key=lambda text: hashlib.sha256(text.encode()).digest())
    total = sum(map(len, ordered))
    splits: dict[str, list[str]] = {}
    for split, share in SHARES.items():
        size, splits[split] = 0, []
        while ordered and size < share * total:
            splits[split].append(ordered.pop())
            size += len(splits[split][-1])
    return {"train": ordered, **splits}


def read_page(path: Path) -> str:
    """Return the text of a file; nothing if it is not UTF-8."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return ""
    if _kind(path) in (".html", ".htm"):
        parser = _PageText()
        parser.feed(text)
        text = "".join(parser.parts)
    lines = (re.sub(r"[ \t]+$", "", line) for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _PageText(HTMLParser):
    """Collect the text of a page, with a line break for each block."""

    _HIDDEN = frozenset(("script", "style", "head", "nav"))
    _BLOCKS = frozenset(
        ("p", "div", "h1", "h2", "h3", "h4", "h5", "li", "dt", "dd", "tr", "pre", "table", "br")
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden, self._preformatted = 0, 0

    def handle_starttag(self, tag, attrs) -> None:
        self._hidden += tag in self._HIDDEN
        self._preformatted += tag == "pre"
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag) -> None:
        self._hidden -= tag in self._HIDDEN
        self._preformatted -= tag == "pre"
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data) -> None:
        if self._hidden <= 0:
            self.parts.append(data if self._preformatted > 0 else re.sub(r"\s+", " ", data))


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix == ".gz" else path.stem


def _natural_order(path: Path) -> list:
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", str(path))
    ]


if __name__ == "__main__":
    sys.exit(main())
