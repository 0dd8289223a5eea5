"""The file in which a rank leaves the reason of its end for the launcher that started it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Failure:
    """Why a rank ended.

    Attributes:
        sentence: what the rank reported; empty if it reported nothing.
        is_bad_input: whether a user's input was the reason, so that another try would fail alike.
    """

    sentence: str = ""
    is_bad_input: bool = False


# The launcher makes this file in the directory below which torchrun places the files of the ranks.
PRINTS_REASONS = "launcher-prints-reasons"


def leave_reason(sentence: str, is_bad_input: bool) -> bool:
    """Write the reason where torchrun looks for it; outside torchrun nothing is written.

    Returns:
        Whether ``megalard.launcher`` prints the sentence at its end, so that the rank does not have
        to. A rank that is started again prints its sentence itself.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return False
    extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
    content = {
        "message": {"message": sentence, "extraInfo": extra},
        "megalard": {"sentence": sentence, "is_bad_input": is_bad_input},
    }
    try:
        Path(path).write_text(json.dumps(content))
    except OSError:
        return False
    if not any((folder / PRINTS_REASONS).exists() for folder in Path(path).parents):
        return False
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return is_bad_input or restarts >= int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def failure_of(error_file: str) -> Failure:
    """Return the reason that a rank left."""
    try:
        reason = json.loads(Path(error_file).read_text())["megalard"]
        return Failure(str(reason["sentence"]), bool(reason["is_bad_input"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Failure()
