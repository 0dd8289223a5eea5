"""Resuming and exporting after files were moved, touched or changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.command_line import megalard, refusal
from tests.jobs import STEPS, arguments, interrupted, make_job

SAVE = ("checkpoint.save_every=4",)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A job with a whole run, in a place that its model and text will leave."""
    folder = tmp_path_factory.mktemp("moves") / "old"
    folder.mkdir()
    make_job(folder)
    assert megalard("train", *arguments(folder, folder / "whole", *SAVE)) == 0
    return folder


@pytest.fixture
def moved(job, tmp_path) -> Path:
    """A run that was stopped half-way, whose model was moved from ``before`` to ``after``."""
    shutil.copytree(job / "model", tmp_path / "after")
    interrupted(job / "whole", tmp_path / "run")
    return tmp_path


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_a_moved_model_is_the_same_model(job, moved):
    words = arguments(job, moved / "run", *SAVE, f"model.teacher={moved / 'after'}")
    assert megalard("train", *words) == 0
    assert_same_weights(job / "whole" / "student", moved / "run" / "student")


def test_a_model_that_is_gone_is_named(job, moved, capsys):
    words = arguments(job, moved / "run", *SAVE, f"model.teacher={moved / 'before'}")
    assert str(moved / "before") in refusal(capsys, "train", *words)


def test_text_with_another_date_is_the_same_text(job, moved):
    text = moved / "train.txt"
    shutil.copy(job / "train.txt", text)
    os.utime(text, (1, 1))
    assert megalard("train", *arguments(job, moved / "run", *SAVE, f"data.paths={text}")) == 0


def test_more_steps_are_another_schedule(job, moved, capsys):
    words = arguments(job, moved / "run", *SAVE, f"optimizer.steps={2 * STEPS}")
    assert "optimizer.steps" in refusal(capsys, "train", *words)


def test_a_checkpoint_is_exported_with_its_moved_base(job, moved, capsys):
    place = job.with_name("elsewhere")
    job.rename(place)
    try:
        checkpoint = place / "whole" / "checkpoints" / f"step-{STEPS:06d}"
        line = refusal(capsys, "convert", "export", checkpoint, moved / "export")
        assert str(job / "model") in line and "--base" in line
        words = ("convert", "export", checkpoint, moved / "export", "--base", place / "model")
        assert megalard(*words) == 0
    finally:
        place.rename(job)
    assert_same_weights(job / "whole" / "student", moved / "export")
