"""Text for the quickstart: the running Python's own standard library, split three ways.

    python tools/quickstart/stdlib_text.py runs/stdlib

writes ``train.jsonl``, ``validation.jsonl`` and ``heldout.jsonl``, one JSON object a line:
``{"text": the file's content, "source": its path relative to the standard library}``. Nothing is
downloaded. A file's split depends on its relative path alone, so the held-out files of one machine
are held out on every other; their content follows the Python version.
"""

import argparse
import hashlib
import json
import sys
import sysconfig
from pathlib import Path

SPLITS = ("train", "validation", "heldout")
HELDOUT_PERCENT = 8
VALIDATION_PERCENT = 4

# Tests, other people's packages, and files that are tables or build records, not prose or code.
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
SKIPPED_FILES = {"html/entities.py", "stringprep.py"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


def split_of(relative_path: str) -> str:
    """The split of a file, from the sha256 of its path with forward slashes."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    if percent < HELDOUT_PERCENT:
        return "heldout"
    if percent < HELDOUT_PERCENT + VALIDATION_PERCENT:
        return "validation"
    return "train"


def is_wanted(relative: Path) -> bool:
    """Whether a path below the standard library holds text worth learning from."""
    if relative.as_posix() in SKIPPED_FILES or SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
        return False
    return not any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts)


def collect(root: Path | None = None) -> dict[str, list[dict[str, str]]]:
    """Reads the ``.py`` files below ``root`` in sorted order.

    Args:
        root: the folder to read; the running Python's standard library if None.

    Returns:
        ``{"train": [...], "validation": [...], "heldout": [...]}`` of ``{"text", "source"}``.
        Empty files, files that are not UTF-8 and repeated contents are left out.
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
    return splits


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="where the files go")
    args = parser.parse_args()

    splits = collect()
    if not all(splits.values()):
        root = sysconfig.get_paths()["stdlib"]
        print(
            f"megalard: error: {root} holds too few .py files to make three splits; "
            "run with a Python that has its standard library as source files",
            file=sys.stderr,
        )
        return 1
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, documents in splits.items():
            with open(args.output / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for document in documents:
                    file.write(json.dumps(document, ensure_ascii=False) + "\n")
            size = sum(len(document["text"]) for document in documents)
            print(f"{name:>10}: {len(documents):4d} files, {size / 1e6:.2f} M characters")
    except OSError as error:
        print(f"megalard: error: cannot write to {args.output}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
