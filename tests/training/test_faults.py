"""Killed, full, unwritable, damaged: the previous checkpoint stands and one sentence tells why."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalard.checkpoint.convert import export_adapter, export_model, import_model, size_of
from megalard.checkpoint.open import open_model
from megalard.checkpoint.sharded.manifest import MANIFEST, VERSION, _digest
from megalard.checkpoint.sharded.save_load import (
    ShardedWeights,
    as_dtensor,
    checkpoint_axis,
    save_sharded,
)
from megalard.errors import UserError
from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.parallel.tensor.layout import Layout
from megalard.train import main
from megalard.training.run_folder import checkpoint_path, checkpoints, discard, unfinished
from tests.jobs import STEPS, arguments, interrupted, make_job, metrics
from tests.permissions import give_up_rights
from tests.ranks import run_ranks, start_ranks, wait_for

ROWS = 40_000
SAVE = ("checkpoint.save_every=1", "checkpoint.keep_last=2")


def _save_forever(folder: str, world: int) -> None:
    """Save after save, each with its step in every element, the old ones removed."""
    mesh = build_mesh("cpu", world)
    axis = checkpoint_axis(mesh)
    share = ROWS // world
    layout = Layout((ROWS, 16), 0, mesh.tp.rank * share, share, 1)
    done = checkpoints(Path(folder))
    first = done[-1][0] + 1 if done else 1
    for step in range(first, first + 10_000):
        local = torch.full((share, 16), float(step))
        head = {"kind": "model", "config": {}, "base": None, "trained": None, "training": None}
        head |= {"written_by": {}, "step": step}
        path = checkpoint_path(Path(folder), step)
        save_sharded(path, {"x": as_dtensor(local, layout, mesh)}, head, axis, file_bytes=1)
        if axis.rank == 0:
            for _, old in checkpoints(Path(folder))[:-2]:
                discard(old)


def assert_all_good(folder: Path) -> int:
    """Every checkpoint with a final name is whole and its own; gives the newest step."""
    found = checkpoints(folder)
    for step, path in found:
        weights = ShardedWeights(path)
        weights.check_sums()
        assert bool((weights.read("x") == step).all())
    assert len(found) >= 1
    return found[-1][0]


@pytest.mark.parametrize(
    ("world", "victims", "rounds"), [(1, "all", 25), (2, "one", 8), (2, "all", 8)]
)
def test_killed_at_any_moment_of_a_save(world, victims, rounds, tmp_path):
    chance = random.Random(world)
    newest, left_behind = 0, 0
    for _ in range(rounds):
        ranks = start_ranks(world, _save_forever, str(tmp_path), world)
        deadline = time.monotonic() + 60
        while not (found := checkpoints(tmp_path)) or found[-1][0] <= newest:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.random() * 0.15)
        chosen = ranks if victims == "all" else [chance.choice(ranks)]
        for rank in chosen:
            os.kill(rank.pid, signal.SIGKILL)
        codes = wait_for(ranks, limit_s=20)
        # whoever was not killed found its neighbour gone
        assert all(code not in (0, None) for code in codes)
        now = assert_all_good(tmp_path)
        assert now > newest
        newest, left_behind = now, left_behind + len(unfinished(tmp_path))
    assert left_behind, "no kill met a save half-way"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = make_job(tmp_path_factory.mktemp("faults"))
    run_ranks(1, main, arguments(folder, folder / "whole", *SAVE, "checkpoint.keep_last=9"))
    return folder


def _main_with_output_to(log: str, command: list[str]) -> None:
    with open(log, "a") as file, redirect_stdout(file):
        main(command)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(ranks, job, tmp_path):
    chance, output, kills = random.Random(ranks), tmp_path / "output", 0
    left_behind, log = [], tmp_path / "log"
    keep = ("checkpoint.save_every=1", "checkpoint.keep_last=9")
    command = arguments(job, output, *keep, f"parallel.tp={ranks}")
    while not (output / "student").exists():
        started = start_ranks(ranks, _main_with_output_to, str(log), command)
        if kills < 4:
            begun = len(checkpoints(output / "checkpoints"))
            while any(rank.is_alive() for rank in started):
                if len(checkpoints(output / "checkpoints")) > begun:
                    time.sleep(chance.random() * 0.05)
                    break
                time.sleep(0.002)
            for rank in started:
                rank.kill()
            kills += 1
            wait_for(started)
            left_behind += unfinished(output / "checkpoints")
        else:
            assert wait_for(started) == [0] * ranks
    printed = log.read_text()
    for path in left_behind:
        assert f"{path.name} is a save that was not finished: removed" in printed
    assert printed.count("resuming from") == kills
    assert [line["step"] for line in metrics(output)] == list(range(1, STEPS + 1))
    whole = load_file(job / "whole" / "student" / "model.safetensors")
    found = load_file(output / "student" / "model.safetensors")
    for name, value in whole.items():
        if ranks == 1:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def refusal(capfd, function, *args) -> str:
    """The one line of a command that exits with 1."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        function(*args)
    assert caught.value.code == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if "megalard: error" in line]
    assert len(errors) == 1
    return errors[0]


def _main_with_errors_to(log: str, command: list[str]) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    main(command)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(ranks, asynchronous, job, tmp_path):
    with mounted(tmp_path / "small", "size=900k") as disk:
        options = (f"parallel.tp={ranks}", f"checkpoint.asynchronous={asynchronous}")
        keep = ("checkpoint.save_every=1", "checkpoint.keep_last=99", "optimizer.steps=200")
        command = arguments(job, disk / "output", *keep, *options)
        log = tmp_path / "errors"
        assert wait_for(start_ranks(ranks, _main_with_errors_to, str(log), command)) == [1] * ranks
        told = [x for x in log.read_text().splitlines() if "megalard: error" in x]
        assert len(told) == 1 and "No space left on device" in told[0], told
        assert "cannot write checkpoint" in told[0]
        folder = disk / "output" / "checkpoints"
        assert checkpoints(folder) and not unfinished(folder)
        for _, path in checkpoints(folder):
            ShardedWeights(path).check_sums()


def test_a_full_disk_stops_a_conversion(tmp_path, job):
    source = open_model(job / "model")
    trained = open_model(checkpoint_path(job / "whole" / "checkpoints", STEPS))
    mesh, chance = build_mesh("cpu", 1), random.Random(0)
    for work, needed in (
        (lambda disk: import_model(source, disk / "out", mesh, SINGLE), size_of(source.weights)),
        (lambda disk: export_model(source, disk / "out", SINGLE), size_of(source.weights)),
        (lambda disk: export_adapter(trained, disk / "out"), size_of(trained.trained)),
    ):
        for _ in range(8):
            size = chance.randrange(4096, needed + 4096)  # the small files need more
            with mounted(tmp_path / "small", f"size={size}") as disk:
                with pytest.raises(UserError, match="No space left on device"):
                    work(disk)
                assert list(disk.iterdir()) == []


def test_an_unwritable_directory_is_named(tmp_path, job, capfd):
    with mounted(tmp_path / "locked", "ro") as disk:
        line = refusal(capfd, main, arguments(job, disk / "output", *SAVE))
        assert f"cannot write to run.output {disk / 'output'}: Read-only file system" in line
    output = tmp_path / "output"
    shutil.copytree(job / "whole", output)
    shutil.rmtree(output / "student")
    discard(checkpoint_path(output / "checkpoints", STEPS))
    cache = f"data.cache={job / 'whole' / 'tokens'}"
    (output / "keep").mkdir()
    with mounted(output / "checkpoints" / "step-000008.partial", "ro"):
        line = refusal(capfd, main, arguments(job, output, *SAVE, cache))
        assert "cannot write checkpoint" in line


def _without_the_right_to_write_anywhere(log: str, command: list[str]) -> None:
    """As somebody who is not root: the capability to pass over permissions is given up."""
    give_up_rights()
    _main_with_errors_to(log, command)


def test_a_directory_of_somebody_else_is_named(job, tmp_path):
    """Before training starts, and when the checkpoints' directory is closed on the way."""
    locked, output, log = tmp_path / "locked", tmp_path / "output", tmp_path / "errors"
    locked.mkdir(0o555)
    shutil.copytree(job / "whole", output)
    shutil.rmtree(output / "student")
    discard(checkpoint_path(output / "checkpoints", STEPS))
    before = snapshot(output / "checkpoints")
    for path in (output / "checkpoints", *(output / "checkpoints").iterdir()):
        path.chmod(0o555)
    sentences = {
        locked / "output": f"cannot write to run.output {locked / 'output'}: Permission denied",
        output: f"cannot write checkpoint {checkpoint_path(output / 'checkpoints', STEPS)}: "
        "Permission denied",
    }
    for place, sentence in sentences.items():
        command = arguments(job, place, *SAVE, "checkpoint.keep_last=9")
        started = start_ranks(1, _without_the_right_to_write_anywhere, str(log), command)
        assert wait_for(started) == [1]
        told = [line for line in log.read_text().splitlines() if "megalard: error" in line]
        assert sentence in told[-1], told
    assert len(told) == 2 and snapshot(output / "checkpoints") == before
    assert list(locked.iterdir()) == []


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


@pytest.mark.parametrize("round_", range(4))
def test_a_flipped_byte_stops_the_next_start(round_, job, tmp_path, capfd):
    """In the manifest, the weights, the optimizer's state or the config, by chance."""
    output = tmp_path / "output"
    shutil.copytree(job / "whole", output)
    newest = checkpoint_path(output / "checkpoints", STEPS)
    names = sorted(path.name for path in newest.iterdir())
    victim = newest / [MANIFEST, "weights-00000-000.safetensors", *names][round_]
    flip(victim, random.Random(round_).randrange(victim.stat().st_size))
    before = snapshot(output)
    line = refusal(capfd, main, arguments(job, output, *SAVE, "checkpoint.keep_last=9"))
    assert victim.name in line
    assert snapshot(output) == before
    # and the hint works
    shutil.rmtree(newest)
    main(arguments(job, output, *SAVE, "checkpoint.keep_last=9"))


def another_version(checkpoint: Path) -> str:
    body = json.loads((checkpoint / MANIFEST).read_text())
    body["version"] = VERSION + 1
    body.pop("checksum")
    (checkpoint / MANIFEST).write_text(json.dumps({**body, "checksum": _digest(body)}))
    return f"was written in version {VERSION + 1} of the format"


def missing_shard(checkpoint: Path) -> str:
    (checkpoint / "weights-00000-000.safetensors").unlink()
    return f"{checkpoint} lacks weights-00000-000.safetensors"


def shard_of_another_step(checkpoint: Path) -> str:
    name = "weights-00000-000.safetensors"
    shutil.copy(checkpoint.with_name("step-000007") / name, checkpoint / name)
    return f"{checkpoint / name} "


@pytest.mark.parametrize("damage", [another_version, missing_shard, shard_of_another_step])
def test_a_run_does_not_go_on_from_what_is_not_its_checkpoint(damage, job, tmp_path, capfd):
    output = tmp_path / "output"
    shutil.copytree(job / "whole", output)
    sentence = damage(checkpoint_path(output / "checkpoints", STEPS))
    before = snapshot(output)
    assert sentence in refusal(capfd, main, arguments(job, output, *SAVE, "checkpoint.keep_last=9"))
    assert snapshot(output) == before


def test_nothing_is_unpickled(job, monkeypatch, tmp_path):
    """Loading a checkpoint runs no code from it: a model, an adapter, a run that goes on."""
    import pickle

    import_model(open_model(job / "model"), tmp_path / "sharded", build_mesh("cpu", 1), SINGLE)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    export_model(open_model(tmp_path / "sharded"), tmp_path / "out", SINGLE)
    trained = open_model(checkpoint_path(job / "whole" / "checkpoints", STEPS))
    export_adapter(trained, tmp_path / "adapter")
    export_model(open_model(tmp_path / "adapter"), tmp_path / "merged", SINGLE)
    output = interrupted(job / "whole", tmp_path / "output")
    main(arguments(job, output, *SAVE, f"data.cache={job / 'whole' / 'tokens'}"))
    assert (output / "student" / "config.json").exists()
