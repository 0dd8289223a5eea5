"""Multiple-choice questions, and the files that hold them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        contexts: the text before each choice; often the same for all choices.
        choices: the texts to choose from.
        answer: the index of the right choice.
        per_byte: whether log-likelihoods are divided by the number of bytes of the choice.
    """

    contexts: list[str]
    choices: list[str]
    answer: int
    per_byte: bool


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write questions, one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for question in questions:
            file.write((json.dumps(question.__dict__) + "\n").encode())


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file of ``write_questions``."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [Question(**json.loads(line)) for line in file]
