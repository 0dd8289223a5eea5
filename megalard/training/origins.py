"""The models that a run started from. A checkpoint notes their files and does not copy them."""

from __future__ import annotations

from dataclasses import dataclass

from megalard.checkpoint.open import StoredModel
from megalard.checkpoint.provenance import check_files, describe_files, moved_to
from megalard.checkpoint.sharded.manifest import Manifest
from megalard.parallel.mesh import SINGLE, Axis


@dataclass(frozen=True)
class Origins:
    """The models of a run.

    Attributes:
        base: the model whose weights the student started from.
        teacher: None if the student started from the teacher, which is then the base.
    """

    base: StoredModel
    teacher: StoredModel | None = None

    def describe(self, axis: Axis) -> dict:
        """Return the sections ``base`` and ``teacher`` of a manifest; a collective call.

        Raises:
            UserError: on every rank, if a file cannot be read.
        """
        teacher = None if self.teacher is None else describe_files(self.teacher.weights, axis)
        return {"base": describe_files(self.base.weights, axis), "teacher": teacher}

    def check(self, manifest: Manifest, share: Axis = SINGLE) -> None:
        """Refuse models that are not the models of a run's checkpoint. A rank reads its share.

        Raises:
            UserError: a file is missing or differs; the message names the first one.
        """
        check_files(manifest.base, self.base.directory, share)
        if manifest.teacher or self.teacher:
            note, model = manifest.teacher or manifest.base, self.teacher or self.base
            check_files(note, model.directory, share, role="teacher")

    def checked_sections(self, manifest: Manifest) -> dict:
        """Return what ``describe`` returns, without reading the files, after ``check`` passed."""
        teacher = None
        if self.teacher is not None:
            teacher = moved_to(manifest.teacher or manifest.base, self.teacher.directory)
        return {"base": moved_to(manifest.base, self.base.directory), "teacher": teacher}
