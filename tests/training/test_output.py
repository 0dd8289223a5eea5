"""The output directory: which run may use it, locks, and settings that may not change."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from megalard.errors import UserError
from megalard.files import locks
from megalard.parallel.mesh import build_mesh
from megalard.training import output as output_module
from megalard.training.output import Output, emptied_on_error, scratch_folder
from megalard.training.run_folder import checkpoint_path
from tests.checkpoint.sharded.damage import rewrite_manifest
from tests.command_line import refusal
from tests.conversions import to_sharded
from tests.jobs import STEPS, arguments, interrupted, losses, make_job, snapshot, train
from tests.ranks import run_ranks
from tests.training.test_resume import SAVE, STREAMS


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job with a complete run, and a complete run of two streams."""
    folder = make_job(tmp_path_factory.mktemp("output"))
    train(arguments(folder, folder / "one", *SAVE))
    train(arguments(folder, folder / "streams", *SAVE, *STREAMS))
    return folder


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("optimizer.learning_rate=0.02", "0.01, not 0.02"),
        ("run.seed=1", "0, not 1"),
        ("rope.factor=8", "4.0, not 8.0"),
        ("trainable.lora={rank: 8, alpha: 8, dropout: 0.1}", "4, not 8"),
        ("data.packing=false", "True, not False"),
    ],
)
def test_a_setting_that_may_not_change_is_named(option, values, job, tmp_path, capsys):
    output = interrupted(job / "one", tmp_path / "output")
    before = snapshot(output)
    line = refusal(capsys, "train", *arguments(job, output, *SAVE, option))
    key = option.partition("=")[0].replace("trainable.lora", "trainable.lora.rank")
    assert f"run.output {output} holds a run with {key} {values}: choose another" in line
    assert snapshot(output) == before


def test_settings_that_may_change_do_not_stop_a_resumed_run(job, tmp_path):
    output = interrupted(job / "one", tmp_path / "output")
    moved = shutil.copytree(job / "model", tmp_path / "model")
    text = tmp_path / "train.txt"
    shutil.copy2(job / "train.txt", text)
    tokens = shutil.copytree(output / "tokens", tmp_path / "tokens")
    options = (
        "run.log_every=2",
        "run.non_finite=skip",
        "run.trackers=[]",
        "run.profile=[6]",
        "checkpoint.keep_last=3",
        "optimizer.micro_batch=1",
        f"model.teacher={moved}",
        f"data.paths={tokens}",
    )
    train(arguments(job, output, "checkpoint.save_every=2", *options))
    assert (output / "student" / "model.safetensors").exists()


def test_a_run_saved_with_an_old_spelling_is_resumed(job, tmp_path):
    """Before objective.attention_output was called so, run.json and manifests had the old name."""
    output = interrupted(job / "one", tmp_path / "output")

    def rename(tree: dict) -> None:
        tree["objective"]["attention_context"] = tree["objective"].pop("attention_output")

    for path in (output / "checkpoints").iterdir():
        rewrite_manifest(path, lambda body: rename(body["training"]["config"]))
    note = json.loads((output / "run.json").read_text())
    rename(note)
    (output / "run.json").write_text(json.dumps(note))
    train(arguments(job, output, *SAVE))
    assert losses(output) == losses(job / "one")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("weight: 0.5", "weight: 0.7"), "holds a run with streams.short.weight 0.5, not 0.7"),
        (
            ("short:", "brief:"),
            "holds a run with other streams (long, short, not long, brief): choose",
        ),
        (("context_length: 64", "context_length: 32"), "streams.long.data.context_length 64, not"),
    ],
)
def test_other_streams_are_refused(change, sentence, job, tmp_path, capsys):
    output = interrupted(job / "streams", tmp_path / "output")
    options = [option.replace(*change) for option in STREAMS]
    assert sentence in refusal(capsys, "train", *arguments(job, output, *SAVE, *options))


def test_a_run_of_another_process_is_left_alone(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.2)
    output = interrupted(job / "one", tmp_path / "output")
    (output / "checkpoints" / "step-000006.partial").mkdir()
    command = arguments(job, output, *SAVE)
    with locks.hold_lock(output / "run.json", "there"):
        line = refusal(capsys, "train", *command)
    assert f"another process is writing to run.output {output}" in line
    assert (output / "checkpoints" / "step-000006.partial").exists()
    # A run that began meanwhile in a directory that this run took for empty.
    with monkeypatch.context() as patches:
        patches.setattr(output_module, "find_output", lambda *arguments: Output(output))
        line = refusal(capsys, "train", *command)
    assert f"another process has begun a run in run.output {output}" in line
    train(command)


def test_a_checkpoint_that_another_process_saved_meanwhile_is_found(
    job, tmp_path, capsys, monkeypatch
):
    """The same command twice: the second looks, waits for the first, and looks again.

    The first is killed after its last checkpoint.
    """
    output, hold_lock = interrupted(job / "one", tmp_path / "output"), locks.hold_lock

    def hold_after_the_other(*place):
        monkeypatch.setattr(output_module, "hold_lock", hold_lock)
        train(arguments(job, output, *SAVE))
        (output / "finished.json").unlink()
        return hold_lock(*place)

    monkeypatch.setattr(output_module, "hold_lock", hold_after_the_other)
    train(arguments(job, output, *SAVE))
    resumed = [line for line in capsys.readouterr().out.splitlines() if "resuming" in line]
    assert [line.split()[-1] for line in resumed] == ["4", str(STEPS)]
    assert losses(output) == losses(job / "one")


@pytest.mark.parametrize("preflight", [[], ["--preflight"]], ids=["train", "preflight"])
def test_a_directory_that_is_not_empty_is_left_alone(preflight, job, tmp_path, capsys):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("precious")
    line = refusal(capsys, "train", *preflight, *arguments(job, tmp_path))
    assert f"run.output {tmp_path} is not empty: choose another directory" in line
    assert snapshot(tmp_path) == {"student/config.json": b"precious"}
    file = tmp_path / "student" / "config.json"
    line = refusal(capsys, "train", *preflight, *arguments(job, file))
    assert line.endswith(f"run.output {file} is a file: choose a directory")
    assert file.read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_named(job, tmp_path, capsys):
    (tmp_path / "file").touch()
    line = refusal(capsys, "train", *arguments(job, tmp_path / "file" / "output"))
    assert f"cannot write to run.output {tmp_path / 'file' / 'output'}: Not a directory" in line


@pytest.mark.parametrize("content", ["{ cut", "[]", "3", "[" * 100_000])
def test_a_directory_with_another_run_json_is_left_alone(content, job, tmp_path, capsys):
    (tmp_path / "run.json").write_text(content)
    line = refusal(capsys, "train", *arguments(job, tmp_path))
    assert f"run.output {tmp_path} is not empty: choose another directory" in line
    assert snapshot(tmp_path) == {"run.json": content.encode()}


def test_a_named_pipe_in_place_of_run_json_is_refused_at_once(job, tmp_path, capsys):
    os.mkfifo(tmp_path / "run.json")
    line = refusal(capsys, "train", *arguments(job, tmp_path))
    assert f"run.output {tmp_path} is not empty: choose another directory" in line


def test_a_run_that_was_killed_at_once_begins_again(job, tmp_path):
    (tmp_path / "run.json").touch()
    train(arguments(job, tmp_path, "optimizer.steps=1"))
    assert (tmp_path / "student").exists()
    assert json.loads((tmp_path / "run.json").read_text())["optimizer"]["steps"] == 1


@pytest.mark.parametrize("save", [(), SAVE], ids=["without checkpoints", "with checkpoints"])
def test_a_run_that_has_finished_is_left_alone(save, job, tmp_path, capsys):
    command = arguments(job, tmp_path / "output", "optimizer.steps=2", *save)
    train(command)
    before = snapshot(tmp_path / "output")
    capsys.readouterr()
    train(command)
    assert capsys.readouterr().out == (
        f"the run in {tmp_path / 'output'} has finished: the restored model is in "
        f"{tmp_path / 'output' / 'student'}; nothing was changed\n"
    )
    assert snapshot(tmp_path / "output") == before


def without(file, *keys):
    """Take settings out of a record, as if a version had written it that did not have them."""
    record = json.loads(file.read_text())
    for key in keys:
        section, name = key.split(".")
        del record[section][name]
    file.write_text(json.dumps(record))


def test_a_run_that_an_earlier_version_finished_is_left_alone(job, tmp_path, capsys):
    output = shutil.copytree(job / "one", tmp_path / "output")
    without(output / "finished.json", "data.format", "checkpoint.export_dtype")
    before = snapshot(output)
    train(arguments(job, output, *SAVE))
    assert "nothing was changed" in capsys.readouterr().out and snapshot(output) == before


def test_settings_that_are_newer_than_a_run_had_their_defaults(job, tmp_path, capsys):
    """Its steps obeyed the defaults, so the run cannot go on with other values."""
    output = tmp_path / "output"
    output.mkdir()
    train(arguments(job, tmp_path / "other", "optimizer.steps=1"))
    shutil.copy(tmp_path / "other" / "run.json", output)
    without(output / "run.json", "data.packing", "checkpoint.keep_last")
    options = ("optimizer.steps=1", "checkpoint.keep_last=7")
    line = refusal(capsys, "train", *arguments(job, output, *options, "data.packing=false"))
    assert f"run.output {output} holds a run with data.packing True, not False" in line
    train(arguments(job, output, *options))
    assert (output / "student").exists()


@pytest.mark.parametrize("change", ["a setting", "no student"])
def test_a_run_that_has_not_finished_in_this_form_goes_on(change, job, tmp_path, capsys):
    output = shutil.copytree(job / "one", tmp_path / "output")
    options = ["run.log_every=3"] if change == "a setting" else []
    if not options:
        shutil.rmtree(output / "student")
    train(arguments(job, output, *SAVE, *options))
    assert f"after step {STEPS}" in capsys.readouterr().out
    student = (output / "student" / "model.safetensors").read_bytes()
    assert student == (job / "one" / "student" / "model.safetensors").read_bytes()


def test_a_full_model_among_the_checkpoints_is_refused(job, tmp_path, capsys):
    output = interrupted(job / "one", tmp_path / "output")
    model = checkpoint_path(output / "checkpoints", 9)
    to_sharded(job / "model", model)
    line = refusal(capsys, "train", *arguments(job, output, *SAVE))
    assert f"error: {model} is a whole model and not a checkpoint of a run: move it out" in line


def test_an_error_empties_the_directory_of_a_new_run_alone(tmp_path):
    """The checkpoints of a resumed run stay."""
    for is_new in (True, False):
        output = Output(tmp_path / str(is_new), is_new=is_new)
        (output.directory / "checkpoints" / "step-000002").mkdir(parents=True)
        (output.directory / "run.json").touch()
        with pytest.raises(UserError), emptied_on_error(output, build_mesh("cpu", 1)):
            raise UserError("a path that is not there")
        left = sorted(path.name for path in output.directory.rglob("*"))
        assert left == ([] if is_new else ["checkpoints", "run.json", "step-000002"])


def _scratch(results: str) -> None:
    mesh = build_mesh("cpu", 1)
    with scratch_folder(mesh) as folder:
        folder.mkdir(exist_ok=True)
        with open(f"{results}/{mesh.world.rank}", "w") as file:
            file.write(str(folder))
    assert not folder.exists() or mesh.world.rank > 0


def test_the_scratch_folder_has_one_name_on_all_ranks_and_is_removed(tmp_path):
    run_ranks(2, _scratch, str(tmp_path))
    names = {path.read_text() for path in tmp_path.iterdir()}
    assert len(names) == 1 and not os.path.exists(names.pop())
