"""What to do with things that are not read: names on the Hugging Face Hub, GGUF files, tables."""

from __future__ import annotations

import re
from pathlib import Path

# OWNER/NAME, as the Hub has it.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_GGUF = ".gguf"
_TABLES = (".csv", ".tsv", ".json")
_PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip")


def fix_for_missing_model(path: Path) -> str:
    """Return what to give instead of a path at which there is no model directory."""
    if path.suffix == _GGUF:
        return f"make a directory of it with python -m tools.convert_gguf {path} DIR, and give DIR"
    if looks_like_hub_name(path):
        return (
            f"if that is a name on the Hugging Face Hub, download it with hf download {path} "
            "--local-dir DIR, and give DIR"
        )
    return "give a Hugging Face model directory"


def fix_for_model_without(directory: Path, file: str) -> str:
    """Return what to do with a directory that lacks a file of a model."""
    try:
        gguf = next((path for path in sorted(directory.iterdir()) if path.suffix == _GGUF), None)
    except OSError:
        gguf = None
    if gguf is not None:
        return f"make a directory of {gguf.name} with python -m tools.convert_gguf {gguf} DIR"
    return f"give a Hugging Face model directory, which has a {file}"


def fix_for_text(path: Path) -> str:
    """Return what to do with text that is not in a format that is read, or not there."""
    if path.suffix.lower() in _TABLES:
        return "write it as .jsonl, such as with the method to_json of the package datasets"
    if path.suffix.lower() in _PACKED:
        return "unpack it first"
    if not path.exists() and looks_like_hub_name(path):
        return (
            "check its spelling; a dataset on the Hugging Face Hub is tokenized by "
            f"megalard prepare --dataset {path}"
        )
    return "check its spelling"


def looks_like_hub_name(path: Path) -> bool:
    """Whether a path at which there is nothing may be a name on the Hugging Face Hub."""
    return _HUB_NAME.fullmatch(str(path)) is not None and not path.parent.exists()
