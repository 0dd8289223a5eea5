"""A run that was stopped goes on: the same losses and weights, on its own topology or another."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megalard import train
from megalard.checkpoint.sharded.manifest import read_manifest
from megalard.checkpoint.sharded.save_load import ShardedWeights
from megalard.files import locks
from megalard.train import main
from megalard.training import assemble, saver
from megalard.training.resume import Output
from megalard.training.run_folder import checkpoint_path
from tests.jobs import STEPS, arguments, interrupted, losses, make_job
from tests.ranks import run_ranks, start_ranks, wait_for

SAVE = ("checkpoint.save_every=2", "checkpoint.keep_last=9")
ALL = ("trainable.mode=all", "objective.logits_kl=0.5", "model.compute_dtype=float32")
STREAMS = (
    "trainable.mode=all",
    "streams={long: {objective: {language_modelling: 1}, data: {context_length: 64}, "
    "global_batch: 4}, short: {objective: {hidden_cosine: 5, hidden_depths: [0.5, 1]}, "
    "data: {positions: skip-gaussian}, weight: 0.5}}",
)
# summation order alone differs between topologies: fp32 rounding through the steps that are left
TOLERANCE = 1e-4

RUNS = {
    "one": (1, ()),
    "tp2": (2, ("parallel.tp=2",)),
    "dp2": (2, ("checkpoint.asynchronous=false",)),
    "cp2": (2, ("parallel.cp=2",)),
    "all": (1, ALL),
    "all-tp2": (2, ("parallel.tp=2", *ALL)),
    "streams": (1, STREAMS),
}
# which run's checkpoint, on how many ranks, with which options
RESUMED = {
    "one on one": ("one", 1, ()),
    "tp2 on tp2": ("tp2", 2, ("parallel.tp=2",)),
    "dp2 on dp2": ("dp2", 2, ("checkpoint.asynchronous=true",)),
    "cp2 on cp2": ("cp2", 2, ("parallel.cp=2",)),
    "tp2 on one": ("tp2", 1, ()),
    "one on tp4": ("one", 4, ("parallel.tp=4",)),
    "dp2 on one": ("dp2", 1, ()),
    "one on cp2": ("one", 2, ("parallel.cp=2",)),
    "one on dp2 tp2": ("one", 4, ("parallel.tp=2",)),
    "all on one": ("all", 1, ALL),
    "all-tp2 on tp4": ("all-tp2", 4, ("parallel.tp=4", *ALL)),
    "streams on one": ("streams", 1, STREAMS),
    "streams on dp2 cp2": ("streams", 4, ("parallel.cp=2", *STREAMS)),
}


def run(ranks: int, job: Path, output: Path, *options: str) -> None:
    run_ranks(ranks, main, arguments(job, output, *SAVE, *options))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job, and every run of ``RUNS`` uninterrupted."""
    folder = make_job(tmp_path_factory.mktemp("resume"))
    for name, (ranks, options) in RUNS.items():
        run(ranks, folder, folder / name, *options)
    return folder


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(case, job, tmp_path):
    name, ranks, options = RESUMED[case]
    output = interrupted(job / name, tmp_path / "output")
    run(ranks, job, output, *options)
    whole = load_file(job / name / "student" / "model.safetensors")
    resumed = load_file(output / "student" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    same = case.partition(" on ")[0] == case.partition(" on ")[2]
    same = same or case in ("all on one", "streams on one")
    if same:
        assert losses(output) == losses(job / name)
        assert all(torch.equal(resumed[key], value) for key, value in whole.items())
        return
    assert losses(output) == pytest.approx(losses(job / name), rel=TOLERANCE)
    for key, value in whole.items():
        error = (resumed[key].double() - value.double()).norm() / value.double().norm()
        assert error < TOLERANCE, f"{key} is off by {error:.1e}"


def test_deterministic_kernels_are_a_setting_of_the_run(job, tmp_path, capsys):
    """What makes resumption exact on GPUs; a run that does not ask for it is not slowed down."""
    for value in (True, False):
        wanted = f"run.deterministic={value}"
        refusal(capsys, job, tmp_path / "output", wanted, "data.paths=/nowhere")
        assert torch.are_deterministic_algorithms_enabled() == value


def test_it_says_what_it_goes_on_from(job, tmp_path, capfd):
    output = interrupted(job / "one", tmp_path / "output")
    (output / "checkpoints" / "step-000006.partial").mkdir()
    for name in ("mine.partial", "notes.removed"):
        (output / "checkpoints" / name).mkdir()
    (output / "checkpoints" / "step-000005.partial").write_text("a file")
    main(arguments(job, output, *SAVE))
    printed = capfd.readouterr().out
    assert printed.count("was not finished") == 1
    left = {path.name for path in (output / "checkpoints").iterdir()}
    assert left >= {"mine.partial", "notes.removed", "step-000005.partial"}
    assert "step-000006.partial is a save that was not finished: removed" in printed
    assert f"resuming from {output / 'checkpoints' / 'step-000004'} after step 4" in printed
    # and once finished there is nothing left to do but the export
    main(arguments(job, output, *SAVE))
    assert f"after step {STEPS}" in capfd.readouterr().out


def test_the_newest_and_every_mth_checkpoint_are_kept(job, tmp_path):
    output = tmp_path / "output"
    keep = ("checkpoint.save_every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    main(arguments(job, output, *keep))
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000006", "step-000007", "step-000008"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_exits_with_0(number, job, tmp_path):
    """One of two ranks gets it; no checkpoint interval is configured."""
    output = tmp_path / "output"
    command = arguments(job, output, "parallel.tp=2", "optimizer.steps=2000")
    ranks = start_ranks(2, main, command)
    deadline = time.monotonic() + 60
    while not ((output / "metrics.jsonl").exists() and len(metrics_so_far(output)) > 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(ranks[1].pid, number)
    assert wait_for(ranks) == [0, 0]
    (saved,) = (output / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert metrics_so_far(output)[-1] == step and not (output / "student").exists()
    # the same command goes on from there
    ranks = start_ranks(2, main, command)
    while metrics_so_far(output)[-1] <= step:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for rank in ranks:
        os.kill(rank.pid, number)
    assert wait_for(ranks) == [0, 0]
    steps = metrics_so_far(output)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step


def test_a_signal_while_the_student_is_saved_ends_the_run_after_it(job, tmp_path, monkeypatch):
    output, save = tmp_path / "output", train.save_student

    def save_student(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args)

    monkeypatch.setattr(train, "save_student", save_student)
    evaluated = []
    monkeypatch.setattr(train.Evaluator, "after", lambda *args: evaluated.append(args))
    main(arguments(job, output))
    assert (output / "student" / "config.json").exists() and not evaluated
    # no interval is configured, and still the same command goes on from there
    monkeypatch.setattr(train, "save_student", save)
    main(arguments(job, output))
    assert len(evaluated) == 1


def metrics_so_far(output: Path) -> list[int]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def run_stuck(command: list[str], reached: Path) -> None:
    """Each of two ranks waits for the other inside of gloo, where Python calls no handler."""

    def wait(*_):
        rank = dist.get_rank()
        (reached / str(rank)).touch()
        dist.recv(torch.zeros(1), src=1 - rank)

    assemble.load_models = wait
    main(command)


def test_a_signal_before_the_first_step_ends_the_run_at_once(job, tmp_path):
    command = arguments(job, tmp_path / "output", "parallel.tp=2")
    (tmp_path / "reached").mkdir()
    ranks = start_ranks(2, run_stuck, command, tmp_path / "reached")
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "reached").iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    assert wait_for(ranks, 20) == [0, 0]
    main(arguments(job, tmp_path / "output"))


def refusal(capsys, *command) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments(*command))
    assert caught.value.code == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("megalard: error: ") and "\n" not in line
    return line


@pytest.mark.parametrize(
    "option",
    ["optimizer.learning_rate=0.02", "trainable.lora.rank=8", "run.seed=1", "rope.factor=8"],
)
def test_another_configuration_is_refused_by_its_key(option, job, tmp_path, capsys):
    output = interrupted(job / "one", tmp_path / "output")
    options = [option]
    if option.startswith("trainable"):
        options = ["trainable.lora={rank: 8, alpha: 8, dropout: 0.1}"]
    line = refusal(capsys, job, output, *SAVE, *options)
    assert f"holds a run with {option.partition('=')[0]} " in line
    assert not (output / "student").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("weight: 0.5", "weight: 0.7"), "holds a run with streams.short.weight 0.5, not 0.7"),
        (("short:", "brief:"), "holds a run with other streams"),
        (("context_length: 64", "context_length: 32"), "streams.long.data.context_length 64"),
    ],
)
def test_other_streams_are_refused(change, sentence, job, tmp_path, capsys):
    output = interrupted(job / "streams", tmp_path / "output")
    options = [option.replace(*change) for option in STREAMS]
    assert sentence in refusal(capsys, job, output, *SAVE, *options)


def test_another_text_is_refused(job, tmp_path, capsys):
    output = interrupted(job / "one", tmp_path / "output")
    text = tmp_path / "other.txt"
    text.write_text((job / "train.txt").read_text().upper())
    cache = f"data.cache={tmp_path / 'cache'}"
    line = refusal(capsys, job, output, *SAVE, f"data.paths={text}", cache)
    assert "the text is not the one" in line


@pytest.mark.parametrize("place", [4, -1], ids=["header", "data"])
def test_a_changed_bit_is_told_with_the_checkpoint_to_go_on_from(place, job, tmp_path, capsys):
    output = interrupted(job / "one", tmp_path / "output")
    damaged = checkpoint_path(output / "checkpoints", 4)
    shard = sorted(damaged.glob("optimizer-*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    line = refusal(capsys, job, output, *SAVE)
    assert "is damaged" in line and line.endswith(f"; remove {damaged} to go on from step-000002")
    shutil.rmtree(damaged)
    main(arguments(job, output, *SAVE))


def test_another_base_model_is_refused_and_a_moved_one_is_not(job, tmp_path, capsys):
    output = interrupted(job / "one", tmp_path / "output")
    model = shutil.copytree(job / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    line = refusal(capsys, job, output, *SAVE, f"model.teacher={model}")
    assert f"{weights} is damaged or of another model" in line
    weights.write_bytes(content)
    main(arguments(job, output, *SAVE, f"model.teacher={model}"))
    assert (output / "student" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def models(job, tmp_path_factory):
    """A run with a student of its own, that student, and a copy of the teacher, changed."""
    folder = tmp_path_factory.mktemp("models")
    student = shutil.copytree(job / "model", folder / "student")
    flip(student / "model.safetensors")
    main(arguments(job, folder / "whole", *SAVE, f"model.student={student}"))
    changed = shutil.copytree(job / "model", folder / "changed")
    flip(changed / "model.safetensors")
    return folder


def flip(path: Path) -> None:
    """Change the lowest bit of the last value."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def test_another_teacher_is_refused_and_a_moved_one_is_not(job, models, tmp_path, capsys):
    output = interrupted(models / "whole", tmp_path / "output")
    own = f"model.student={models / 'student'}"
    line = refusal(capsys, job, output, *SAVE, own, f"model.teacher={models / 'changed'}")
    assert f"{models / 'changed' / 'model.safetensors'} is damaged or of another model" in line
    assert "the checkpoint's note of its teacher" in line
    moved = shutil.copytree(job / "model", tmp_path / "moved")
    main(arguments(job, output, *SAVE, own, f"model.teacher={moved}"))
    assert losses(output) == losses(models / "whole")
    # and the checkpoints it wrote say where both are now
    noted = read_manifest(checkpoint_path(output / "checkpoints", STEPS))
    assert (noted.base["path"], noted.teacher["path"]) == (str(models / "student"), str(moved))
    assert (
        noted.teacher["files"]
        == read_manifest(checkpoint_path(models / "whole" / "checkpoints", STEPS)).teacher["files"]
    )


def test_a_student_of_its_own_does_not_hide_a_changed_teacher(job, models, tmp_path, capsys):
    """The run's student started from its teacher; the same files now come as model.student."""
    output = interrupted(job / "one", tmp_path / "output")
    options = (f"model.student={job / 'model'}", f"model.teacher={models / 'changed'}")
    assert "note of its teacher" in refusal(capsys, job, output, *SAVE, *options)


def test_a_run_that_goes_on_elsewhere_is_left_alone(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.2)
    output = interrupted(job / "one", tmp_path / "output")
    (output / "checkpoints" / "step-000006.partial").mkdir()
    with locks.hold(output / "run.json", "there"):
        line = refusal(capsys, job, output, *SAVE)
    assert f"another process is writing to run.output {output}" in line
    assert (output / "checkpoints" / "step-000006.partial").exists()
    # what was begun meanwhile, in a directory that this run found empty
    with monkeypatch.context() as patches:
        patches.setattr(assemble, "find_output", lambda *arguments: Output(output))
        line = refusal(capsys, job, output, *SAVE)
    assert f"another process has begun a run in run.output {output}" in line
    main(arguments(job, output, *SAVE))


def test_what_another_process_saved_before_it_let_go_is_found(job, tmp_path, capsys, monkeypatch):
    """The same command twice: the second looks, waits for the first, and looks again."""
    output, hold = interrupted(job / "one", tmp_path / "output"), locks.hold

    def hold_after_the_other(*place):
        monkeypatch.setattr(assemble, "hold", hold)
        main(arguments(job, output, *SAVE))
        return hold(*place)

    monkeypatch.setattr(assemble, "hold", hold_after_the_other)
    main(arguments(job, output, *SAVE))
    resumed = [line for line in capsys.readouterr().out.splitlines() if "resuming" in line]
    assert [line.split()[-1] for line in resumed] == ["4", str(STEPS)]
    assert losses(output) == losses(job / "one")


def test_a_run_stopped_before_its_first_checkpoint_starts_again(job, tmp_path, capsys):
    output = interrupted(job / "one", tmp_path / "output", step=0)
    main(arguments(job, output, *SAVE))
    assert "holds no complete checkpoint: from the start" in capsys.readouterr().out
    assert losses(output) == losses(job / "one")


def test_training_goes_on_while_a_checkpoint_is_written(job, tmp_path, monkeypatch):
    """And what is written is the state of its step, not of the step by then."""
    output = tmp_path / "output"
    write, overtaken = saver.save_sharded, []

    def late(directory, *args, **kwargs):
        step = int(directory.name.removeprefix("step-"))
        deadline = time.monotonic() + 20
        while metrics_so_far(output)[-1] < min(step + 1, STEPS) and time.monotonic() < deadline:
            time.sleep(0.01)
        overtaken.append(metrics_so_far(output)[-1] - step)
        write(directory, *args, **kwargs)

    monkeypatch.setattr(saver, "save_sharded", late)
    main(arguments(job, output, *SAVE))
    assert [count >= 1 for count in overtaken] == [True, True, True, False]
    for step in (2, 4, 6, 8):
        ours, theirs = (
            ShardedWeights(checkpoint_path(folder / "checkpoints", step))
            for folder in (output, job / "one")
        )
        assert ours.manifest.tensors.keys() == theirs.manifest.tensors.keys()
        for name in ours.manifest.tensors:
            if not name.startswith("rng."):
                assert torch.equal(ours.read(name), theirs.read(name)), (step, name)
