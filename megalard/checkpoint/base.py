"""The model a run started from: not written again, but named by its path and its checksums."""

from __future__ import annotations

import os
from pathlib import Path

from megalard.checkpoint.manifest import check_sums
from megalard.checkpoint.merged import Weights
from megalard.checkpoint.tensor_file import file_sha256
from megalard.errors import UserError
from megalard.parallel.agreement import checked_on_all_ranks, gather_objects
from megalard.parallel.mesh import SINGLE, Axis


def describe_base(weights: Weights, axis: Axis) -> dict:
    """Path, sizes and checksums of a model's files; a collective call, the files shared out.

    Raises:
        UserError: on every rank, when a file cannot be read.
    """
    directory = weights.directory
    config = directory / "config.json"
    paths = sorted({*weights.files(), *([config] if config.is_file() else [])})
    mine = {}
    with checked_on_all_ranks(axis):
        for path in paths[axis.rank :: axis.size]:
            # a base that is itself a run's checkpoint has a base elsewhere
            name = os.path.relpath(path, directory)
            try:
                mine[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from None
    files = {k: v for part in gather_objects(mine, axis) for k, v in part.items()}
    return {"path": str(directory.absolute()), "files": dict(sorted(files.items()))}


def check_base(
    base: dict, directory: str | Path, share: Axis = SINGLE, progress=lambda count: None
) -> None:
    """Refuse a base whose files are not those the checkpoint was written against.

    A rank of ``share`` looks at every file's length and reads its share of them.

    Raises:
        UserError: naming the first file that is missing or differs.
    """
    for name, file in base["files"].items():
        path = Path(directory) / name
        if not path.is_file() or path.stat().st_size != file["size"]:
            raise UserError(
                f"{path} is not the file the checkpoint was trained on: give the base model's "
                "own directory"
            )
    files = list(base["files"].items())[share.rank :: share.size]
    check_sums(directory, files, "the checkpoint's note of its base model", progress)
