"""A disk that is full or read-only: one sentence, and what was saved before is untouched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.train import main
from megalard.training.run_folder import checkpoint_path, checkpoints, discard, unfinished
from tests.command_line import refusal
from tests.jobs import STEPS, arguments, make_job, snapshot, train
from tests.mounts import mounted
from tests.permissions import give_up_rights
from tests.ranks import exit_codes, started_ranks

SAVE = ("checkpoint.save_every=1", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job with a complete run."""
    folder = make_job(tmp_path_factory.mktemp("disks"))
    train(arguments(folder, folder / "complete", *SAVE))
    return folder


def without_the_last_step(job: Path, output: Path) -> Path:
    """Copy the complete run without its student and its last checkpoint."""
    shutil.copytree(job / "complete", output)
    shutil.rmtree(output / "student")
    discard(checkpoint_path(output / "checkpoints", STEPS))
    return output


def _main_with_errors_to(log: str, command: list[str]) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    main(command)


def errors(log: Path) -> list[str]:
    """Return the error lines of all starts so far."""
    return [line for line in log.read_text().splitlines() if "megalard: error" in line]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(ranks, asynchronous, job, tmp_path):
    with mounted(tmp_path / "small", "size=900k") as disk:
        options = (f"parallel.tp={ranks}", f"checkpoint.asynchronous={asynchronous}")
        keep = ("checkpoint.save_every=1", "checkpoint.keep_last=99", "optimizer.steps=200")
        command, log = arguments(job, disk / "output", *keep, *options), tmp_path / "errors"
        with started_ranks(ranks, _main_with_errors_to, str(log), command) as started:
            assert exit_codes(started) == [1] * ranks, log.read_text()
        assert len(errors(log)) == 1, log.read_text()
        (line,) = errors(log)
        # While a save is in the background, the metrics may meet the full disk first.
        places = ["cannot write checkpoint"]
        if asynchronous == "true":
            places.append("rank 0 cannot read or write")
        assert any(place in line for place in places) and "No space left on device" in line
        folder = disk / "output" / "checkpoints"
        assert checkpoints(folder) and not unfinished(folder)
        for _, path in checkpoints(folder):
            ShardedWeights(path).check_sums()


def test_a_read_only_directory_is_named(tmp_path, job, capsys):
    with mounted(tmp_path / "locked", "ro") as disk:
        line = refusal(capsys, "train", *arguments(job, disk / "output", *SAVE))
        assert f"cannot write to run.output {disk / 'output'}: Read-only file system" in line
    output = without_the_last_step(job, tmp_path / "output")
    cache = f"data.cache={job / 'complete' / 'tokens'}"
    with mounted(output / "checkpoints" / "step-000008.partial", "ro"):
        line = refusal(capsys, "train", *arguments(job, output, *SAVE, cache))
        assert "cannot write checkpoint" in line


def _without_rights(log: str, command: list[str]) -> None:
    give_up_rights()
    _main_with_errors_to(log, command)


def test_a_directory_of_another_user_is_named(job, tmp_path):
    """Before training starts, and where the directory of the checkpoints is closed later."""
    locked, log = tmp_path / "locked", tmp_path / "errors"
    locked.mkdir(0o555)
    output = without_the_last_step(job, tmp_path / "output")
    before = snapshot(output / "checkpoints")
    for path in (output / "checkpoints", *(output / "checkpoints").iterdir()):
        path.chmod(0o555)
    sentences = {
        locked / "output": f"cannot write to run.output {locked / 'output'}: Permission denied",
        output: f"cannot write checkpoint {checkpoint_path(output / 'checkpoints', STEPS)}: "
        "Permission denied",
    }
    for place, sentence in sentences.items():
        command = arguments(job, place, *SAVE)
        with started_ranks(1, _without_rights, str(log), command) as started:
            assert exit_codes(started) == [1]
        assert sentence in errors(log)[-1]
    assert len(errors(log)) == 2 and snapshot(output / "checkpoints") == before
    assert list(locked.iterdir()) == []
