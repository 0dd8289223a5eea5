"""Saving: in the background, at intervals and at the end, with old checkpoints removed."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.config.schema import CheckpointConfig
from megalard.errors import UserError
from megalard.parallel.mesh import SINGLE
from megalard.training import run as run_module
from megalard.training import saver as saver_module
from megalard.training.run_folder import checkpoint_path, checkpoints
from megalard.training.saver import Saver
from tests.command_line import refusal
from tests.jobs import STEPS, arguments, make_job, metrics, steps_reported, train
from tests.ranks import wait_until

SAVE = ("checkpoint.save_every=2", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job with a complete run that saves before it continues."""
    folder = make_job(tmp_path_factory.mktemp("saver"))
    train(arguments(folder, folder / "one", *SAVE, "checkpoint.asynchronous=false"))
    return folder


def saved_steps(output: Path) -> list[int]:
    return [step for step, _ in checkpoints(output / "checkpoints")]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ("save_every=1 keep_last=2 keep_every=3", [3, 6, 7, 8]),
        ("save_every=1 keep_last=1", [8]),
        # One more is saved at the end, where save_every does not divide the steps.
        ("save_every=3 keep_last=9", [3, 6, 8]),
        ("save_every=5", [5, 8]),
        ("save_every=50", [8]),
        ("save_every=0", []),
    ],
)
def test_checkpoints_are_saved_and_kept_as_configured(settings, kept, job, tmp_path):
    options = [f"checkpoint.{setting}" for setting in settings.split()]
    train(arguments(job, tmp_path / "output", *options))
    assert saved_steps(tmp_path / "output") == kept


def test_a_checkpoint_beyond_those_to_keep_is_removed_by_the_next_start(job, tmp_path):
    """A process that is killed between a save and the removal leaves one."""
    output = shutil.copytree(job / "one", tmp_path / "output")
    (output / "finished.json").unlink()
    assert saved_steps(output) == [2, 4, 6, 8]
    train(arguments(job, output, "checkpoint.save_every=2", "checkpoint.keep_last=3"))
    assert saved_steps(output) == [4, 6, 8]


def test_training_continues_while_a_checkpoint_is_written(job, tmp_path, monkeypatch):
    """What is written is the state of its own step and not of the step by then."""
    output = tmp_path / "output"
    write, steps_ahead = saver_module.save_sharded, []

    def late(directory, *args, **kwargs):
        step = int(directory.name.removeprefix("step-"))
        wait_until(lambda: steps_reported(output)[-1] >= min(step + 1, STEPS))
        steps_ahead.append(steps_reported(output)[-1] - step)
        write(directory, *args, **kwargs)

    monkeypatch.setattr(saver_module, "save_sharded", late)
    train(arguments(job, output, *SAVE))
    assert [count >= 1 for count in steps_ahead] == [True, True, True, False]
    for step in (2, 4, 6, 8):
        ours, theirs = (
            ShardedWeights(checkpoint_path(folder / "checkpoints", step))
            for folder in (output, job / "one")
        )
        assert ours.manifest.tensors.keys() == theirs.manifest.tensors.keys()
        for name in ours.manifest.tensors:
            if not name.startswith("rng."):
                assert torch.equal(ours.read(name), theirs.read(name)), (step, name)


def test_a_failed_save_in_the_background_ends_the_run_at_the_next_step(
    job, tmp_path, monkeypatch, capsys
):
    """Not at the next save, which may be hours later, and not at the end."""
    failed = threading.Event()

    def fail(directory, *args, **kwargs):
        failed.set()
        raise UserError("cannot write checkpoint: the disk is gone")

    step = run_module.Run.step

    def step_after_the_failure(self, stage, number):
        if number == 3:
            assert failed.wait(60)
            time.sleep(0.1)  # until the future has its exception
            wait_until(self.saver.has_failed)
        return step(self, stage, number)

    monkeypatch.setattr(saver_module, "save_sharded", fail)
    monkeypatch.setattr(run_module.Run, "step", step_after_the_failure)
    options = ("checkpoint.save_every=2", "optimizer.steps=50")
    line = refusal(capsys, "train", *arguments(job, tmp_path / "output", *options))
    assert line == "megalard: error: cannot write checkpoint: the disk is gone"
    assert [entry["step"] for entry in metrics(tmp_path / "output")] == [1, 2, 3]


def make_saver(folder: Path, resumed_step: int = 0, **settings) -> Saver:
    """Return the saver of an unreal run of 10 steps."""
    return Saver(folder, 10, None, (), CheckpointConfig(**settings), SINGLE, {}, resumed_step)


@pytest.mark.parametrize(
    ("every", "due"), [(0, []), (1, list(range(1, 11))), (4, [4, 8, 10]), (10, [10]), (99, [10])]
)
def test_a_checkpoint_is_due_at_the_interval_and_at_the_end(every, due, tmp_path):
    with make_saver(tmp_path, save_every=every) as saver:
        assert [step for step in range(1, 11) if saver.is_due(step)] == due


def test_the_step_that_a_run_resumed_from_is_not_saved_again(tmp_path):
    with make_saver(tmp_path, resumed_step=4) as saver:
        saver.save(4)
        assert not saver.is_writing() and not saver.has_failed()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_save_does_not_mask_the_error_that_ends_the_run(tmp_path):
    def fail() -> None:
        raise UserError("the disk")

    with pytest.raises(ZeroDivisionError), make_saver(tmp_path) as saver:
        saver._running = saver._thread.submit(fail)
        raise ZeroDivisionError
    with pytest.raises(UserError, match="the disk"), make_saver(tmp_path) as saver:
        saver._running = saver._thread.submit(fail)


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(job, tmp_path, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(saver_module, "discard", refuse)
    options = ("checkpoint.save_every=4", "checkpoint.keep_last=1")
    train(arguments(job, tmp_path / "output", *options))
    path = checkpoint_path(tmp_path / "output" / "checkpoints", 4)
    expected = f"warning: cannot remove the old checkpoint {path}: Permission denied\n"
    assert expected in capsys.readouterr().out
    assert saved_steps(tmp_path / "output") == [4, 8]
