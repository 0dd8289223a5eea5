"""The models a run started from: not written again, but named by their paths and checksums."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megalard.checkpoint.sharded.manifest import Manifest, check_sums
from megalard.checkpoint.weights import Weights
from megalard.errors import UserError
from megalard.files.safetensors import cannot_read, file_sha256
from megalard.parallel.agreement import checked_on_all_ranks, gather_objects
from megalard.parallel.mesh import SINGLE, Axis


@dataclass(frozen=True)
class Origins:
    """The files of a run's models.

    Attributes:
        base: what the student started from.
        teacher: None where the student started from the teacher, which is then the base.
    """

    base: Weights
    teacher: Weights | None = None

    def describe(self, axis: Axis) -> dict:
        """The manifest's ``base`` and ``teacher``; a collective call.

        Raises:
            UserError: on every rank, when a file cannot be read.
        """
        teacher = None if self.teacher is None else describe_base(self.teacher, axis)
        return {"base": describe_base(self.base, axis), "teacher": teacher}

    def check(self, manifest: Manifest, share: Axis = SINGLE) -> None:
        """Refuse models that are not those of a run's checkpoint; a rank reads its share.

        Raises:
            UserError: naming the first file that is missing or differs.
        """
        check_base(manifest.base, self.base.directory, share)
        if manifest.teacher or self.teacher:
            note, files = manifest.teacher or manifest.base, self.teacher or self.base
            check_base(note, files.directory, share, whose="teacher")

    def describe_checked(self, manifest: Manifest) -> dict:
        """What ``describe`` gives after ``check`` has passed, without reading the files again."""
        teacher = self.teacher and _found_at(manifest.teacher or manifest.base, self.teacher)
        return {"base": _found_at(manifest.base, self.base), "teacher": teacher}


def _found_at(note: dict, weights: Weights) -> dict:
    return {**note, "path": str(weights.directory.absolute())}


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
    base: dict,
    directory: str | Path,
    share: Axis = SINGLE,
    progress=lambda count: None,
    whose: str = "base model",
    sums: bool = True,
) -> None:
    """Refuse a base whose files are not those the checkpoint was written against.

    A rank of ``share`` looks at every file's length and, with ``sums``, reads its share of them.

    Raises:
        UserError: naming the first file that is missing or differs.
    """
    for name, file in base["files"].items():
        path = Path(directory) / name
        try:
            same = path.is_file() and path.stat().st_size == file["size"]
        except OSError as error:
            raise cannot_read(path, error) from None
        if not same:
            raise UserError(
                f"{path} is not the file the checkpoint was trained on: give the {whose}'s own "
                "directory"
            )
    files = list(base["files"].items())[share.rank :: share.size] if sums else []
    check_sums(directory, files, f"the checkpoint's note of its {whose}", progress)
