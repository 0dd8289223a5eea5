"""Processes that are killed: the previous checkpoint is complete, and the next start resumes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalard.checkpoint.sharded.manifest import MANIFEST
from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.checkpoint.sharded.save_load import (
    as_dtensor,
    checkpoint_axis,
    save_sharded,
)
from megalard.checkpoint.write_options import WriteOptions
from megalard.model.parameter_slice import ParameterSlice
from megalard.parallel.mesh import build_mesh
from megalard.train import main
from megalard.training.run_folder import checkpoint_path, checkpoints, discard, unfinished
from tests.checkpoint.sharded.damage import (
    WEIGHTS,
    another_version,
    flip,
    missing_shard,
    shard_of_another_step,
)
from tests.command_line import refusal
from tests.conversions import to_adapter, to_hugging_face, to_sharded
from tests.jobs import STEPS, arguments, interrupted, make_job, metrics, snapshot, train
from tests.ranks import exit_codes, started_ranks, wait_until

ROWS = 40_000
SAVE = ("checkpoint.save_every=1", "checkpoint.keep_last=9")


def _save_forever(folder: str, world: int) -> None:
    """Save again and again, with the step in every element, and remove old checkpoints."""
    mesh = build_mesh("cpu", world)
    axis, share = checkpoint_axis(mesh), ROWS // world
    held = ParameterSlice((ROWS, 16), 0, mesh.tp.rank * share, share, 1)
    saved = checkpoints(Path(folder))
    start = saved[-1][0] + 1 if saved else 1
    for step in range(start, start + 10_000):
        local = torch.full((share, 16), float(step))
        sections = {"kind": "model", "config": {}, "base": None, "trained": None, "training": None}
        sections |= {"written_by": {}, "step": step}
        path, tensors = checkpoint_path(Path(folder), step), {"x": as_dtensor(local, held, mesh)}
        save_sharded(path, tensors, sections, axis, WriteOptions(file_bytes=1))
        if axis.rank == 0:
            for _, old in checkpoints(Path(folder))[:-2]:
                discard(old)


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint; 0 if there is none."""
    return max((step for step, _ in checkpoints(folder)), default=0)


def assert_all_complete(folder: Path) -> int:
    """Read every checkpoint, which must have the values of its step; return the newest step."""
    saved = checkpoints(folder)
    for step, path in saved:
        weights = ShardedWeights(path)
        weights.check_sums()
        assert bool((weights.read("x") == step).all())
    return newest_step(folder)


@pytest.mark.parametrize(
    ("world", "victims", "rounds"), [(1, "all", 25), (2, "one", 8), (2, "all", 8)]
)
def test_a_kill_at_any_moment_of_a_save_leaves_complete_checkpoints(
    world, victims, rounds, tmp_path
):
    chance = random.Random(world)
    newest, leftovers = 0, 0
    for _ in range(rounds):
        with started_ranks(world, _save_forever, str(tmp_path), world) as ranks:
            wait_until(lambda newest=newest: newest_step(tmp_path) > newest)
            time.sleep(chance.random() * 0.15)
            for rank in ranks if victims == "all" else [chance.choice(ranks)]:
                os.kill(rank.pid, signal.SIGKILL)
            # A rank that was not killed fails, because the other is gone.
            assert all(code not in (0, None) for code in exit_codes(ranks, 30))
        step = assert_all_complete(tmp_path)
        assert step > newest
        newest, leftovers = step, leftovers + len(unfinished(tmp_path))
    assert leftovers, "no kill happened during a save"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job with a complete run."""
    folder = make_job(tmp_path_factory.mktemp("killed"))
    train(arguments(folder, folder / "complete", *SAVE))
    return folder


def _main_with_output_to(log: str, command: list[str]) -> None:
    with open(log, "a") as file, redirect_stdout(file):
        main(command)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_repeatedly_ends_like_an_uninterrupted_one(ranks, job, tmp_path):
    chance, output, log, kills = random.Random(ranks), tmp_path / "output", tmp_path / "log", 0
    leftovers = []
    command = arguments(job, output, *SAVE, f"parallel.tp={ranks}")
    while not (output / "student").exists():
        saved = len(checkpoints(output / "checkpoints"))
        with started_ranks(ranks, _main_with_output_to, str(log), command) as started:
            if kills == 4:
                assert exit_codes(started) == [0] * ranks
                continue
            wait_until(
                lambda saved=saved, started=started: (
                    len(checkpoints(output / "checkpoints")) > saved
                    or not any(rank.is_alive() for rank in started)
                )
            )
            time.sleep(chance.random() * 0.05)
            for rank in started:
                rank.kill()
            kills += 1
            exit_codes(started)
            leftovers += unfinished(output / "checkpoints")
    printed = log.read_text()
    for path in leftovers:
        assert f"{path.name} is a save that was not finished: it was removed" in printed
    assert printed.count("resuming from") == kills
    assert [line["step"] for line in metrics(output)] == list(range(1, STEPS + 1))
    complete = load_file(job / "complete" / "student" / "model.safetensors")
    student = load_file(output / "student" / "model.safetensors")
    for name, value in complete.items():
        if ranks == 1:
            assert torch.equal(student[name], value), name
        else:
            torch.testing.assert_close(student[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("round_", range(4))
def test_a_flipped_bit_stops_the_next_start(round_, job, tmp_path, capsys):
    """In the manifest, the weights, the optimizer's state or the config, at a random place."""
    output = resumable(job / "complete", tmp_path / "output")
    newest = checkpoint_path(output / "checkpoints", STEPS)
    names = sorted(path.name for path in newest.iterdir())
    victim = newest / [MANIFEST, WEIGHTS, *names][round_]
    flip(victim, random.Random(round_).randrange(victim.stat().st_size))
    before, command = snapshot(output), arguments(job, output, *SAVE)
    assert victim.name in refusal(capsys, "train", *command)
    assert snapshot(output) == before
    # The hint of the message helps.
    shutil.rmtree(newest)
    train(command)


def resumable(run: Path, copy: Path) -> Path:
    """Copy a run without the note that it has finished, so that the next start resumes it."""
    shutil.copytree(run, copy)
    (copy / "finished.json").unlink()
    return copy


@pytest.mark.parametrize("damage", [another_version, missing_shard, shard_of_another_step])
def test_a_run_does_not_resume_from_another_checkpoint(damage, job, tmp_path, capsys):
    output = resumable(job / "complete", tmp_path / "output")
    sentence = damage(checkpoint_path(output / "checkpoints", STEPS))
    before = snapshot(output)
    assert sentence in refusal(capsys, "train", *arguments(job, output, *SAVE))
    assert snapshot(output) == before


def test_nothing_is_unpickled(job, monkeypatch, tmp_path):
    """Loading runs no code from a model, an adapter or a run's checkpoint."""
    import pickle

    to_sharded(job / "model", tmp_path / "sharded")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    to_hugging_face(tmp_path / "sharded", tmp_path / "out")
    to_adapter(checkpoint_path(job / "complete" / "checkpoints", STEPS), tmp_path / "adapter")
    to_hugging_face(tmp_path / "adapter", tmp_path / "merged")
    output = interrupted(job / "complete", tmp_path / "output")
    train(arguments(job, output, *SAVE, f"data.cache={job / 'complete' / 'tokens'}"))
    assert (output / "student" / "config.json").exists()
