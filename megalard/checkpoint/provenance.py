"""Which model files a run started from, noted by path, size and sha256 instead of being copied."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from megalard.checkpoint.weights import Weights
from megalard.errors import UserError
from megalard.files.reading import cannot_read
from megalard.files.writing import Progress, file_sha256, no_progress
from megalard.parallel.agreement import checked_on_all_ranks, gather_objects
from megalard.parallel.mesh import SINGLE, Axis


def describe_files(weights: Weights, axis: Axis) -> dict:
    """Return path, sizes and checksums of a model's files; a collective call.

    The ranks of the axis share the files.

    Raises:
        UserError: on every rank, if a file cannot be read.
    """
    directory = weights.directory
    config = directory / "config.json"
    paths = sorted({*weights.files(), *([config] if config.is_file() else [])})
    local_files = {}
    with checked_on_all_ranks(axis):
        for path in paths[axis.rank :: axis.size]:
            # A model that is itself a run's checkpoint has files in the directory of its base.
            name = os.path.relpath(path, directory)
            try:
                local_files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from None
    files = {k: v for part in gather_objects(local_files, axis) for k, v in part.items()}
    return {"path": str(directory.absolute()), "files": dict(sorted(files.items()))}


def moved_to(note: dict, directory: Path) -> dict:
    """Return the note of a model whose unchanged files are now in ``directory``."""
    return {**note, "path": str(directory.absolute())}


def check_files(
    note: dict,
    directory: str | Path,
    share: Axis = SINGLE,
    progress: Progress = no_progress,
    role: str = "base model",
    with_checksums: bool = True,
) -> None:
    """Refuse a directory whose files are not the files that a note describes.

    Every rank of ``share`` looks at the length of every file, and reads its share of the files to
    compare checksums.

    Args:
        note: as ``describe_files`` returned it.
        role: what the model is to the checkpoint, for the error message.
        with_checksums: whether the content of the files is compared too.

    Raises:
        UserError: a file is missing or differs; the message names the first one.
    """
    for name, file in note["files"].items():
        path = Path(directory) / name
        try:
            is_same = path.is_file() and path.stat().st_size == file["size"]
        except OSError as error:
            raise cannot_read(path, error) from None
        if not is_same:
            raise UserError(
                f"{path} is not the file the checkpoint was trained on: give the directory of its "
                f"{role}"
            )
    files = list(note["files"].items())[share.rank :: share.size] if with_checksums else []
    check_checksums(directory, files, f"the checkpoint's note of its {role}", progress)


def check_checksums(
    directory: str | Path,
    files: Iterable[tuple[str, dict]],
    source: str = "its manifest",
    progress: Progress = no_progress,
) -> None:
    """Read files and compare their checksums.

    Args:
        directory: where the files are.
        files: names with ``size`` and ``sha256``.
        source: where the expected checksum comes from, for the error message.

    Raises:
        UserError: a file differs or cannot be read; the message names the first one.
    """
    for name, file in files:
        path = Path(directory) / name
        try:
            sha256 = file_sha256(path, progress)
        except OSError as error:
            raise cannot_read(path, error) from None
        if sha256 != file["sha256"]:
            raise UserError(
                f"{path} is damaged or belongs to another model: its sha256 is {sha256[:12]}…, "
                f"{source} says {file['sha256'][:12]}…; restore the file, or use another checkpoint"
            )
