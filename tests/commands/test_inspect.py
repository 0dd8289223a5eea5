"""The checkpoint tools on a run: its adapter, its base, its checkpoints as JSON."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from megalard.checkpoint import peft as peft_adapter
from megalard.checkpoint.convert import import_model
from megalard.checkpoint.open import open_model
from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.train import main
from megalard.training.run_folder import checkpoint_path
from tests.jobs import arguments, make_job, save_tokenizer
from tests.models import make_model
from tests.ranks import run_ranks
from tests.tools.test_checkpoint_tools import tool

convert, verify, inspect = map(tool, ("convert_hf", "verify_checkpoint", "inspect_checkpoint"))
SAVE = ("checkpoint.save_every=1", "optimizer.steps=2", "optimizer.warmup_steps=1")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job whose run in ``run`` has trained LoRA and saved two checkpoints."""
    folder = make_job(tmp_path_factory.mktemp("run"))
    run_ranks(1, main, arguments(folder, folder / "run", *SAVE))
    return folder


@pytest.fixture
def checkpoint(job):
    return checkpoint_path(job / "run" / "checkpoints", 2)


def test_a_run_s_adapter_is_its_merged_export(job, checkpoint, tmp_path, capsys):
    adapter = ("export", checkpoint, tmp_path / "adapter", "--format", "peft")
    assert convert(*adapter, "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert convert(*adapter) == 0
    assert convert("export", checkpoint, tmp_path / "merged") == 0
    capsys.readouterr()
    assert verify(tmp_path / "adapter", tmp_path / "merged") == 0
    assert "every bit the same" in capsys.readouterr().out
    assert verify(tmp_path / "adapter", job / "model") == 1
    assert inspect(tmp_path / "adapter") == 0
    printed = capsys.readouterr().out
    assert "a PEFT adapter" in printed and "lora rank 4, alpha 8 on " in printed


def test_an_adapter_is_on_the_disk_before_it_has_its_name(checkpoint, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    model, target = open_model(checkpoint), tmp_path / "adapter"
    files = {path.name for path in model.companions}
    before = []
    peft_adapter.write_adapter(
        target,
        model.trained,
        model.manifest.trained,
        model.spec.hf_config,
        "base",
        model.companions,
        before_commit=lambda: before.extend(synced),
    )
    files |= {"adapter_config.json", "adapter_model.safetensors", "config.json"}
    assert files <= {path.name for path in target.iterdir()}
    assert files | {"adapter.partial"} <= set(before)


def test_inspect_tells_whether_the_base_is_there_and_whole(job, checkpoint, tmp_path, capsys):
    base = shutil.copytree(job / "model", tmp_path / "base")
    for path, option in ((checkpoint, ()), (checkpoint, ("--base", base))):
        assert inspect(path, *option) == 0
        assert "base files   are there, checksums hold" in capsys.readouterr().out
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    moved = ("--base", base)
    assert inspect(checkpoint, *moved) == 1
    assert f"{base}/model.safetensors is damaged or of another" in capsys.readouterr().out
    assert inspect(checkpoint, *moved, "--no-checksums") == 0
    assert "are there, checksums not compared" in capsys.readouterr().out
    (base / "model.safetensors").unlink()
    assert inspect(checkpoint, *moved, "--no-checksums") == 1
    assert f"{base}/model.safetensors is not the file" in capsys.readouterr().out
    assert inspect(checkpoint, "--no-base") == 0
    assert "base files" not in capsys.readouterr().out


def test_inspect_looks_at_a_teacher_of_its_own(job, tmp_path, capsys):
    teacher, student = (shutil.copytree(job / "model", tmp_path / x) for x in ("teacher", "own"))
    options = (f"model.teacher={teacher}", f"model.student={student}")
    main(arguments(job, tmp_path / "run", *SAVE, *options))
    capsys.readouterr()
    assert inspect(tmp_path / "run") == 0
    assert "teacher files are there, checksums hold" in capsys.readouterr().out
    content = (teacher / "model.safetensors").read_bytes()
    (teacher / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert inspect(tmp_path / "run") == 1
    printed = capsys.readouterr().out
    assert f"teacher files {teacher}/model.safetensors is damaged" in printed
    assert "the newest has a problem" in printed
    (teacher / "model.safetensors").unlink()
    assert inspect(tmp_path / "run", "--no-checksums") == 1
    assert inspect(tmp_path / "run", "--no-base") == 0


def test_a_run_s_exports_are_no_checkpoints(job, tmp_path, capsys):
    never = ("checkpoint.save_every=0", "checkpoint.export_every=1")
    main(arguments(job, tmp_path / "run", *SAVE, *never))
    capsys.readouterr()
    assert (tmp_path / "run" / "step-000001" / "model.safetensors").exists()
    assert inspect(tmp_path / "run") == 1
    printed = capsys.readouterr().out
    assert "complete checkpoints" not in printed and "NOT USABLE" in printed
    assert inspect(tmp_path / "run" / "step-000001") == 0


def test_inspect_tells_of_tensors_that_are_not_the_model_s(job, tmp_path, capsys):
    model = shutil.copytree(job / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert inspect(model) == 0
    assert "not in model 9 tensors, such as model.layers.2." in capsys.readouterr().out
    assert inspect(job / "model") == 0
    assert "not in model" not in capsys.readouterr().out


def test_a_damaged_run_gives_no_adapter(job, checkpoint, tmp_path, capsys):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shard = next(copy.glob("weights-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert convert("export", copy, tmp_path / "out", "--format", "peft") == 1
    assert f"{shard} is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_run_s_base_of_another_shape_is_told(job, checkpoint, tmp_path, capsys):
    other = make_model("llama", tmp_path / "other", vocab_size=257, intermediate_size=40)
    assert convert("export", checkpoint, tmp_path / "out", "--base", other) == 1
    assert f"in {other} has shape [40, 32], but" in capsys.readouterr().err


def test_inspect_prints_nothing_but_json(job, tmp_path, capsys):
    run = shutil.copytree(job / "run", tmp_path / "run")
    folder = run / "checkpoints"
    (folder / "step-000003.partial").mkdir()
    assert inspect(run, "--json", "--tensors") == 0
    found = json.loads(capsys.readouterr().out)
    assert [os.path.basename(c["directory"]) for c in found["checkpoints"]] == [
        "step-000001",
        "step-000002",
    ]
    assert found["newest"] == "the next start goes on from step-000002"
    assert found["unfinished"] == [str(folder / "step-000003.partial")]
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert found["checkpoints"][0]["slices"][name]["shape"] == [4, 32]
    (folder / "step-000002" / "manifest.json").write_text("{}")
    assert inspect(run, "--json") == 1
    broken = json.loads(capsys.readouterr().out)["checkpoints"][1]
    assert broken["complete"] == "no" and "does not describe" in broken["problem"]
    for directory, status in ((job / "model", 0), (tmp_path, 1)):
        assert inspect(directory, "--json") == status
        assert json.loads(capsys.readouterr().out)["directory"] == str(directory)


def test_a_whole_model_among_the_checkpoints_is_told(job, tmp_path, capsys):
    run = shutil.copytree(job / "run", tmp_path / "run")
    whole = checkpoint_path(run / "checkpoints", 4)
    import_model(open_model(job / "model"), whole, build_mesh("cpu", 1), SINGLE)
    with pytest.raises(SystemExit) as caught:
        main(arguments(job, run, *SAVE, "optimizer.steps=4"))
    assert caught.value.code == 1
    assert f"error: {whole} is a whole model and no checkpoint of a run: move it out of" in (
        capsys.readouterr().err
    )


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("the mask of the rope " * 3)
    return tmp_path / "text.txt"


@pytest.mark.parametrize("option", [("--lines", "-1"), ("--tolerance", "nan")], ids=str)
def test_numbers_that_compare_nothing_are_told(option, job, capsys):
    with pytest.raises(SystemExit) as caught:
        verify(job / "model", job / "model", *option)
    assert caught.value.code == 2
    assert f"{' '.join(option)}: give 0 or more" in capsys.readouterr().err


def test_logits_that_cannot_be_compared_are_told(job, tmp_path, text, capsys):
    other = make_model("llama", tmp_path / "other", vocab_size=300)
    capsys.readouterr()
    for options, sentence in (
        ((job / "model", other), f"{other} has 300 entries"),
        ((job / "model", job / "model", "--tokens", "0"), "0 tokens are nothing to compare"),
        ((job / "model", job / "model", "--tokens", "-3"), "-3 tokens are nothing to compare"),
    ):
        assert verify(*options, "--logits", text) == 2
        printed = capsys.readouterr().err
        assert sentence in printed and printed.count("\n") == 1
    small = make_model("llama", tmp_path / "small", vocab_size=100)
    save_tokenizer(small)
    assert verify(small, small, "--logits", text) == 2
    assert "in the tokenizer of" in capsys.readouterr().err


def test_the_other_model_s_tokenizer_reads_the_text(job, tmp_path, text, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(job / "model" / name, bare)
    assert verify(bare, job / "model", "--logits", text) == 0
    assert verify(bare, bare, "--logits", text) == 2
    assert "has neither tokenizer.json nor tokenizer.model" in capsys.readouterr().err


def test_a_crash_is_no_difference(job, monkeypatch, capsys):
    def crash(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr("megalard.checkpoint.compare.tensor_differences", crash)
    assert verify(job / "model", job / "model") == 2
    assert "RuntimeError: a bug" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        verify("--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "0 the same, 1 different, 2 they could not be compared" in printed
    assert "read by A's tokenizer" in printed
