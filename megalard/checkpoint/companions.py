"""The files next to the weights that others need in order to use a model as it is meant."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
    "tokenizer.model.v*",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# Keys of tokenizer_config.json that hold the longest text.
_LENGTH_KEYS = ("model_max_length", "max_length", "max_len")


@dataclass(frozen=True)
class Companion:
    """A file that is written next to the weights.

    Attributes:
        name: its path in the directory of the model.
        source: the file it is copied from.
        content: the text that is written in place of the source; None copies the source.
    """

    name: str
    source: Path
    content: str | None = None

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        target = folder / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.content is None:
            shutil.copyfile(self.source, target)
        else:
            target.write_text(self.content, encoding="utf-8")


def is_companion(name: str) -> bool:
    """Whether a file or folder next to the weights may be a companion."""
    patterns = (GENERATION_CONFIG, *(pattern.partition("/")[0] for pattern in TOKENIZER_FILES))
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def tokenizer_companions(directory: Path) -> tuple[Companion, ...]:
    """Return the files of the tokenizer in a directory."""
    return tuple(
        _without_code(Companion(path.relative_to(directory).as_posix(), path))
        for pattern in TOKENIZER_FILES
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    )


def find_companions(directory: Path) -> tuple[Companion, ...]:
    """Return the tokenizer's files and the generation file in a directory."""
    generation = directory / GENERATION_CONFIG
    generation_files = (Companion(GENERATION_CONFIG, generation),) if generation.is_file() else ()
    return (*generation_files, *tokenizer_companions(directory))


def for_window(
    companions: Sequence[Companion], native_window: int, window: int
) -> tuple[Companion, ...]:
    """Return the files with their length limits raised to the window of a student.

    transformers cuts texts at the tokenizer's limit, and servers refuse longer requests.

    Args:
        companions: the files of the teacher.
        native_window: the teacher's window. A generation length is raised if it is this number.
        window: the student's window.
    """
    edits = {
        TOKENIZER_CONFIG: lambda key, value: key in _LENGTH_KEYS and value < window,
        GENERATION_CONFIG: lambda key, value: key == "max_length" and value == native_window,
    }

    def edited(companion: Companion) -> Companion:
        if companion.name == "tokenizer.json":
            return _with_longer_truncation(companion, window)
        is_raised = edits.get(companion.name)
        config = None if is_raised is None else _read(companion)
        if is_raised is None or config is None:
            return companion
        raised = {
            key: window
            for key, value in config.items()
            if type(value) in (int, float) and is_raised(key, value)
        }
        return _edit(companion, config | raised) if raised else companion

    return tuple(map(edited, companions))


def _with_longer_truncation(companion: Companion, window: int) -> Companion:
    if b'"truncation": null' in companion.source.read_bytes()[:1000]:
        return companion  # as nearly always; the file may be large
    content = _read(companion)
    truncation = (content or {}).get("truncation")
    if not isinstance(truncation, dict) or not _is_below(truncation.get("max_length"), window):
        return companion
    return _edit(companion, {**(content or {}), "truncation": {**truncation, "max_length": window}})


def _is_below(value: Any, window: int) -> bool:
    return type(value) is int and value < window


def _without_code(companion: Companion) -> Companion:
    """Return a companion without its entry for Python code, which is neither run nor copied."""
    if companion.name != TOKENIZER_CONFIG:
        return companion
    config = _read(companion)
    if config is None or "auto_map" not in config:
        return companion
    return _edit(companion, {key: value for key, value in config.items() if key != "auto_map"})


def _edit(companion: Companion, config: dict) -> Companion:
    return replace(companion, content=json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _read(companion: Companion) -> dict | None:
    """Return the JSON object of a companion; None if it does not hold one."""
    try:
        text = companion.content or companion.source.read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None
