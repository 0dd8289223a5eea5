"""Write the text of the quickstart: the standard library of the running Python, in three splits.

    python -m tools.quickstart.stdlib_text --output runs/stdlib

The files train.jsonl, validation.jsonl and heldout.jsonl have one JSON object per line:
{"text": the content of a file, "source": its path relative to the standard library}. Nothing is
downloaded. The split of a file depends on its relative path alone, so the held-out files of one
machine are held out on every other machine. The content of the files depends on the version of
Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
from pathlib import Path

from megalard import cli
from megalard.errors import UserError
from megalard.files.writing import cannot_write
from tools import command_line

SPLITS = ("train", "validation", "heldout")
_HELDOUT_PERCENT = 8
_VALIDATION_PERCENT = 4

# Tests, third-party packages, and files that are tables or build records, neither prose nor code.
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
_SKIPPED_FILES = {"html/entities.py", "stringprep.py"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


def split_of(relative_path: str) -> str:
    """Return the split of a file, by the sha256 of its path with forward slashes."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    if percent < _HELDOUT_PERCENT:
        return "heldout"
    if percent < _HELDOUT_PERCENT + _VALIDATION_PERCENT:
        return "validation"
    return "train"


def is_wanted(relative: Path) -> bool:
    """Whether a file of the standard library is part of the text."""
    if relative.as_posix() in _SKIPPED_FILES or SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
        return False
    return not any(part.startswith(_SKIPPED_PREFIXES) for part in relative.parts)


def collect_splits(root: Path | None = None) -> dict[str, list[dict[str, str]]]:
    """Read the ``.py`` files below a directory in sorted order.

    Args:
        root: the directory to read; when not given, the standard library of the running Python.

    Returns:
        Split to documents, each with ``text`` and ``source``. Empty files, files that are not UTF-8
        and repeated contents are left out.

    Raises:
        UserError: a split has no document.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    seen = set()
    for relative in sorted(path.relative_to(root) for path in root.rglob("*.py")):
        if not is_wanted(relative):
            continue
        content = (root / relative).read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            text = content.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if text.strip():
            source = relative.as_posix()
            splits[split_of(source)].append({"text": text, "source": source})
    if not all(splits.values()):
        raise UserError(
            f"{root} has too few .py files to make three splits: use a Python that has its "
            "standard library as source files"
        )
    return splits


def main(arguments: list[str] | None = None) -> int:
    """Write the text; return the exit status."""
    parser = command_line.make_parser("tools.quickstart.stdlib_text", __doc__)
    command_line.add_output(parser, "where the three files are written")
    options: argparse.Namespace = parser.parse_args(arguments)
    return cli.run(lambda: write(collect_splits(), options.output))


def write(splits: dict[str, list[dict[str, str]]], output: Path) -> None:
    """Write one file per split, and print how much is in it.

    Raises:
        UserError: the directory cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, documents in splits.items():
            with open(output / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for document in documents:
                    file.write(json.dumps(document, ensure_ascii=False) + "\n")
            size = sum(len(document["text"]) for document in documents)
            print(f"{name:>10}: {len(documents):4d} files, {size / 1e6:.2f}M characters")
    except OSError as error:
        raise cannot_write(output, error) from None


if __name__ == "__main__":
    sys.exit(main())
