"""The models that a run started from: another one is refused, a moved one is not."""

from __future__ import annotations

import shutil

import pytest

from megalard.checkpoint.open import open_model
from megalard.checkpoint.provenance import describe_files
from megalard.checkpoint.sharded.manifest import Manifest, read_manifest
from megalard.parallel.mesh import SINGLE
from megalard.training.origins import Origins
from megalard.training.run_folder import checkpoint_path
from tests.command_line import refusal, user_error
from tests.jobs import STEPS, arguments, flip_bit, interrupted, losses, make_job, train
from tests.models import make_model
from tests.training.test_resume import SAVE


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job with a run whose student starts from the teacher, and one with another start.

    ``changed`` is a copy of the teacher in which one bit differs.
    """
    job = make_job(tmp_path_factory.mktemp("origins"))
    train(arguments(job, job / "one", *SAVE))
    student = shutil.copytree(job / "model", job / "student")
    flip_bit(student / "model.safetensors")
    train(arguments(job, job / "two", *SAVE, f"model.student={student}"))
    shutil.copytree(job / "model", job / "changed")
    flip_bit(job / "changed" / "model.safetensors")
    return job


def test_another_base_model_is_refused_and_a_moved_one_is_not(job, tmp_path, capsys):
    output = interrupted(job / "one", tmp_path / "output")
    model = shutil.copytree(job / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    flip_bit(weights, -1)
    command = arguments(job, output, *SAVE, f"model.teacher={model}")
    assert f"{weights} is damaged or belongs to another model" in refusal(capsys, "train", *command)
    weights.write_bytes(content)
    train(command)
    assert (output / "student" / "model.safetensors").exists()


def test_another_teacher_is_refused_and_a_moved_one_is_not(job, tmp_path, capsys):
    output = interrupted(job / "two", tmp_path / "output")
    student = f"model.student={job / 'student'}"
    command = arguments(job, output, *SAVE, student, f"model.teacher={job / 'changed'}")
    line = refusal(capsys, "train", *command)
    changed = job / "changed" / "model.safetensors"
    assert f"{changed} is damaged or belongs to another model" in line
    assert "the checkpoint's note of its teacher says" in line
    moved = shutil.copytree(job / "model", tmp_path / "moved")
    train(arguments(job, output, *SAVE, student, f"model.teacher={moved}"))
    assert losses(output) == losses(job / "two")
    # The checkpoints written after that note where both models are now.
    note = read_manifest(checkpoint_path(output / "checkpoints", STEPS))
    assert (note.base["path"], note.teacher["path"]) == (str(job / "student"), str(moved))
    original = read_manifest(checkpoint_path(job / "two" / "checkpoints", STEPS))
    assert note.teacher["files"] == original.teacher["files"]


def test_a_student_of_its_own_does_not_hide_a_changed_teacher(job, tmp_path, capsys):
    """The run started from its teacher, and the same files are now given as model.student."""
    output = interrupted(job / "one", tmp_path / "output")
    options = (f"model.student={job / 'model'}", f"model.teacher={job / 'changed'}")
    line = refusal(capsys, "train", *arguments(job, output, *SAVE, *options))
    assert "note of its teacher" in line


def test_the_notes_of_a_run_are_those_of_its_models(tmp_path):
    base, teacher = (
        open_model(make_model("llama", tmp_path / name, seed=seed))
        for name, seed in (("base", 0), ("teacher", 1))
    )
    alone, both = Origins(base), Origins(base, teacher)
    assert alone.describe(SINGLE) == {"base": describe_files(base.weights, SINGLE), "teacher": None}
    sections = both.describe(SINGLE)
    assert sections["teacher"] == describe_files(teacher.weights, SINGLE)
    manifest = Manifest(tmp_path, sections)
    both.check(manifest)
    assert both.checked_sections(manifest) == sections
    # The teacher of the checkpoint may not be left out.
    sentence = user_error(alone.check, manifest)
    assert sentence.startswith(f"{tmp_path / 'base' / 'model.safetensors'} is damaged or belongs")
