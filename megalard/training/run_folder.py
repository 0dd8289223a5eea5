"""The folder of a run's checkpoints: ``step-000050`` is complete, with a suffix it is not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_COMPLETE = re.compile(r"step-(\d+)")
_UNFINISHED = re.compile(r"step-\d+\.(partial|removed)")
_REMOVED = ".removed"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and directory of the complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = ((_COMPLETE.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def unfinished(folder: Path) -> list[Path]:
    """What a save or a removal that was killed left behind."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir())


def discard(path: Path) -> None:
    """Remove a complete checkpoint; killed on the way, it leaves none that looks complete."""
    doomed = path.with_name(path.name + _REMOVED)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
