"""The directory of a run's checkpoints.

``step-000050`` is a complete checkpoint. ``step-000050.partial`` and ``step-000050.done-XXXXXXXX``
are saves that were not finished, and ``step-000050.removed`` is a removal that was not finished.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megalard.files.atomic_folder import MARK

# The settings of a run that has finished, in its output directory.
FINISHED = "finished.json"
_COMPLETE = re.compile(r"step-(\d+)")
_UNFINISHED = re.compile(r"step-\d+\.(partial|removed|done-[0-9a-f]{8})")
_REMOVED = ".removed"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after ``step`` steps."""
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of the complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((_COMPLETE.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def unfinished(folder: Path) -> list[Path]:
    """Return the directories that a killed save or a killed removal left behind."""
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name))
    return sorted(path for path in paths if path.is_dir())


def unfinished_exports(directory: Path) -> list[Path]:
    """Return the periodic exports that a killed run left half written in its output directory."""
    paths = unfinished(directory)
    return [path for path in paths if ".done-" in path.name or (path / MARK).is_file()]


def has_finished(directory: Path) -> bool:
    """Whether a run has finished in its output directory, with whatever settings."""
    return (directory / FINISHED).is_file() and (directory / "student").is_dir()


def discard(path: Path) -> None:
    """Remove a complete checkpoint; a kill meanwhile leaves nothing that looks complete."""
    doomed = path.with_name(path.name + _REMOVED)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
