"""``megalard inspect`` describes checkpoints, runs and models, and finds damage."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from megalard.training.run_folder import checkpoint_path
from tests.checkpoint.sharded.damage import rewrite_manifest
from tests.command_line import megalard, noted_bars
from tests.conversions import to_adapter, to_sharded
from tests.jobs import arguments, flip_bit, make_job, train
from tests.models import change_config, make_model
from tests.ranks import run_ranks

SAVE = ("checkpoint.save_every=1", "optimizer.steps=2", "optimizer.warmup_steps=1")


def inspect(*words: object) -> int:
    """Run the command in this process."""
    return megalard("inspect", *words)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job whose run in ``run`` has trained LoRA and saved two checkpoints."""
    folder = make_job(tmp_path_factory.mktemp("inspect"))
    train(arguments(folder, folder / "run", *SAVE))
    return folder


@pytest.fixture
def checkpoint(job):
    """The last checkpoint of the run."""
    return checkpoint_path(job / "run" / "checkpoints", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ``hf`` and, written by two ranks, ``sharded``."""
    folder = tmp_path_factory.mktemp("models")
    make_model("qwen2", folder / "hf", vocab_size=1003)
    run_ranks(2, _convert, str(folder / "hf"), str(folder / "sharded"))
    return folder


def _convert(source: str, target: str) -> None:
    assert megalard("convert", "import", source, target) == 0


def test_a_checkpoint_is_described(folder, capsys):
    assert inspect(folder / "sharded", "--tensors") == 0
    printed = capsys.readouterr().out
    for words in ("2 ranks (dp 1 x cp 1 x tp 2)", "checksums    hold", "complete     yes"):
        assert words in printed
    assert "model.embed_tokens.weight  F32 [1003, 32]  weights-00000-000.safetensors" in printed
    assert inspect(folder / "sharded", "--json", "--no-checksums") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["trained"] == "nothing" and facts["checksums"] == "not compared"


def test_damage_is_reported_with_status_1(folder, tmp_path, capsys):
    copy = shutil.copytree(folder / "sharded", tmp_path / "copy")
    shard = copy / "weights-00001-000.safetensors"
    flip_bit(shard)
    assert inspect(copy) == 1
    assert f"{shard} is damaged" in capsys.readouterr().out
    assert inspect(copy, "--no-checksums") == 0
    shard.unlink()
    assert inspect(copy) == 1
    assert "NOT USABLE" in capsys.readouterr().out
    assert inspect(copy, "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["complete"] == "no" and f"{copy} lacks {shard.name}" in facts["problem"]


def test_other_directories_are_described(folder, checkpoint, tmp_path, capsys):
    assert inspect(folder / "hf") == 0
    printed = capsys.readouterr().out
    for words in ("a Hugging Face model", "qwen2, 3 layers of 32", "kB)", "none are recorded"):
        assert words in printed
    to_adapter(checkpoint, tmp_path / "adapter")
    assert inspect(tmp_path / "adapter") == 0
    printed = capsys.readouterr().out
    assert "a PEFT adapter" in printed and "lora rank 4, alpha 8 on " in printed
    (tmp_path / "empty").mkdir()
    assert inspect(tmp_path / "empty") == 1
    assert f"{tmp_path / 'empty'} has no config.json" in capsys.readouterr().out


def test_the_files_of_the_base_are_compared(job, checkpoint, tmp_path, capsys):
    base = shutil.copytree(job / "model", tmp_path / "base")
    for option in ((), ("--base", base)):
        assert inspect(checkpoint, *option) == 0
        assert "base files   are there, checksums hold" in capsys.readouterr().out
    flip_bit(base / "model.safetensors", -1)
    moved = ("--base", base)
    assert inspect(checkpoint, *moved) == 1
    assert f"{base}/model.safetensors is damaged or belongs to another" in capsys.readouterr().out
    assert inspect(checkpoint, *moved, "--no-checksums") == 0
    assert "are there, checksums not compared" in capsys.readouterr().out
    (base / "model.safetensors").unlink()
    assert inspect(checkpoint, *moved, "--no-checksums") == 1
    assert f"{base}/model.safetensors is not the file" in capsys.readouterr().out
    assert inspect(checkpoint, "--no-base") == 0
    assert "base files" not in capsys.readouterr().out


def test_reading_the_base_shows_its_progress(job, checkpoint, monkeypatch):
    bars = noted_bars(monkeypatch)
    assert inspect(checkpoint) == 0
    total, *counts = bars["base model"]
    files = [job / "model" / name for name in ("config.json", "model.safetensors")]
    assert sum(counts) == total == sum(file.stat().st_size for file in files)


def test_the_files_of_another_teacher_are_compared(job, tmp_path, capsys):
    teacher, student = (shutil.copytree(job / "model", tmp_path / x) for x in ("teacher", "mine"))
    options = (f"model.teacher={teacher}", f"model.student={student}")
    train(arguments(job, tmp_path / "run", *SAVE, *options))
    capsys.readouterr()
    assert inspect(tmp_path / "run") == 0
    assert "teacher files are there, checksums hold" in capsys.readouterr().out
    flip_bit(teacher / "model.safetensors", -1)
    # --base names the directory of the base, and not that of the teacher.
    assert inspect(tmp_path / "run", "--base", student) == 1
    assert inspect(tmp_path / "run") == 1
    printed = capsys.readouterr().out
    assert f"teacher files {teacher}/model.safetensors is damaged" in printed
    assert "the newest has a problem" in printed
    (teacher / "model.safetensors").unlink()
    assert inspect(tmp_path / "run", "--no-checksums") == 1
    assert inspect(tmp_path / "run", "--no-base") == 0


def test_a_problem_of_an_older_checkpoint_is_not_reported_for_the_newest(job, tmp_path, capsys):
    """The older manifest names another base; the next start still resumes from the newest one."""
    run = shutil.copytree(job / "run", tmp_path / "run")
    (run / "finished.json").unlink()

    def change(body):
        body["base"]["files"]["model.safetensors"]["sha256"] = "0" * 64

    rewrite_manifest(checkpoint_path(run / "checkpoints", 1), change)
    assert inspect(run) == 1
    printed = capsys.readouterr().out
    assert printed.count("base files   are there, checksums hold") == 1
    assert "model.safetensors is damaged or belongs to another" in printed
    assert "2 complete checkpoints; the next start resumes from step-000002" in printed


def test_exports_of_a_run_are_not_taken_for_checkpoints(job, tmp_path, capsys):
    never = ("checkpoint.save_every=0", "checkpoint.export_every=1")
    train(arguments(job, tmp_path / "run", *SAVE, *never))
    capsys.readouterr()
    assert (tmp_path / "run" / "step-000001" / "model.safetensors").exists()
    assert inspect(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "complete checkpoints" not in printed and printed.startswith(f"{tmp_path}/run/student\n")
    (tmp_path / "run" / "finished.json").unlink()
    assert inspect(tmp_path / "run") == 1
    assert "NOT USABLE" in capsys.readouterr().out
    assert inspect(tmp_path / "run" / "step-000001") == 0


def test_tensors_that_are_not_the_model_s_are_counted(job, tmp_path, capsys):
    model = shutil.copytree(job / "model", tmp_path / "model")
    change_config(model, num_hidden_layers=1)
    assert inspect(model) == 0
    assert "not in model 9 tensors, such as model.layers.1." in capsys.readouterr().out
    assert inspect(job / "model") == 0
    assert "not in model" not in capsys.readouterr().out


def test_the_step_of_a_checkpoint_is_of_all_stages(job, tmp_path, capsys):
    stages = "stages={a: {optimizer: {steps: 1}}, b: {objective: {logits_kl: 1}}}"
    options = (*SAVE[:1], stages, "optimizer.steps=2", "optimizer.warmup_steps=1")
    train(arguments(job, tmp_path / "run", *options))
    capsys.readouterr()
    assert inspect(checkpoint_path(tmp_path / "run" / "checkpoints", 2)) == 0
    assert "2 of 3, seed 0, 8 blocks read" in capsys.readouterr().out


def test_nothing_but_json_is_printed(job, tmp_path, capsys):
    run = shutil.copytree(job / "run", tmp_path / "run")
    folder = run / "checkpoints"
    (folder / "step-000003.partial").mkdir()
    assert inspect(run, "--json", "--tensors") == 0
    facts = json.loads(capsys.readouterr().out)
    assert [os.path.basename(c["directory"]) for c in facts["checkpoints"]] == [
        "step-000001",
        "step-000002",
    ]
    assert facts["newest"] == f"the run has finished, and its student is in {run / 'student'}"
    assert facts["unfinished"] == [str(folder / "step-000003.partial")]
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert facts["checkpoints"][0]["slices"][name]["shape"] == [4, 32]
    (folder / "step-000002" / "manifest.json").write_text("{}")
    assert inspect(run, "--json") == 1
    broken = json.loads(capsys.readouterr().out)["checkpoints"][1]
    assert broken["complete"] == "no" and "does not describe" in broken["problem"]
    (tmp_path / "empty").mkdir()
    for directory, status in ((job / "model", 0), (tmp_path / "empty", 1)):
        assert inspect(directory, "--json") == status
        assert json.loads(capsys.readouterr().out)["directory"] == str(directory)


def test_a_save_that_was_not_finished_is_named(job, tmp_path, capsys):
    run = shutil.copytree(job / "run", tmp_path / "run")
    path = run / "checkpoints" / "step-000003.partial"
    path.mkdir()
    (run / "finished.json").unlink()
    assert inspect(run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{path}: a save that was not finished; the next start removes it" in lines
    assert lines[-1] == "2 complete checkpoints; the next start resumes from step-000002"


def test_control_characters_of_names_are_escaped(folder, tmp_path, capsys):
    """A name in a file could change the colors of a terminal, or write another line."""
    copy = Path(shutil.copytree(folder / "hf", tmp_path / "copy"))
    change_config(copy, model_type="llama\x1b[31m\nok")
    assert inspect(copy) == 1
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and len(printed.splitlines()) == 1


def test_a_sharded_copy_of_a_run_s_student_has_no_base(job, tmp_path, capsys):
    to_sharded(job / "run" / "student", tmp_path / "sharded")
    assert inspect(tmp_path / "sharded") == 0
    assert "base files" not in capsys.readouterr().out


def test_a_finished_run_without_checkpoints_is_described(job, tmp_path, capsys):
    run = tmp_path / "run"
    train(arguments(job, run, "checkpoint.save_every=0", "optimizer.steps=1"))
    capsys.readouterr()
    assert inspect(run) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{run / 'student'}\n")
    assert "run          it has finished, and keeps no checkpoint" in printed
    assert "a Hugging Face model" in printed
    (run / "student" / "model.safetensors").unlink()
    assert inspect(run) == 1
    assert "NOT USABLE" in capsys.readouterr().out


def test_a_name_that_is_not_utf_8_is_escaped(folder, tmp_path, monkeypatch):
    """On an output whose encoding does not have it, as on a terminal."""
    copy = shutil.copytree(folder / "hf", os.fsdecode(bytes(tmp_path) + b"/out\xff\n"))
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", output)
    assert inspect(copy) == 0
    output.flush()
    printed = output.buffer.getvalue().decode()
    assert printed.splitlines()[0] == f"{tmp_path}/out\\udcff\\n"
