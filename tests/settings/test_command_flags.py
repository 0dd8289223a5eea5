"""train, preflight, convert, inspect and verify: the effect of every flag."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import COMMANDS, megalard, refusal
from tests.settings.command_flags import all_flags, options_of, parser_of_command
from tests.settings.test_every_key import FOLDER, names_of_tests
from tests.settings.tiny_run import make_tiny_job, settings_of


def test_every_flag_has_a_test():
    tests = names_of_tests(FOLDER)
    flags = [
        f"test_{command}_{flag.removeprefix('--').replace('-', '_')}"
        for command, names in all_flags().items()
        for flag in sorted(names)
    ]
    assert len(flags) > 35
    assert [name for name in flags if name not in tests] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_written_in_one_way(command):
    """As ``(default: 10)``, at the end of the help text of an option."""
    for action in options_of(parser_of_command(command)):
        text = " ".join((action.help or "").split())
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert re.search(r"\(default: [^()]+\)$", text), (action.option_strings, text)
        assert text.count("(default") == text.count("(default: ") <= 1, (
            action.option_strings,
            text,
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    """With a text, and with a name in capitals for a value that is not one of a few choices."""
    for action in options_of(parser_of_command(command)):
        assert action.help, action.option_strings
        if action.nargs != 0 and not action.choices:
            assert (action.metavar or "").isupper(), action.option_strings


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A job with a finished run, whose checkpoint is ``state``, and two sharded models."""
    folder = make_tiny_job(tmp_path_factory.mktemp("flags"))
    words = settings_of(folder, folder / "run", ("checkpoint.save_every=3",))
    assert megalard("train", *words) == 0
    (folder / "state").symlink_to(folder / "run" / "checkpoints" / "step-000003")
    assert megalard("convert", "import", folder / "teacher", folder / "sharded") == 0
    return folder


@pytest.fixture
def moved(job):
    """The base model of the checkpoint under another name, while a test runs."""
    place = job / "moved"
    (job / "teacher").rename(place)
    yield place
    place.rename(job / "teacher")


@pytest.mark.parametrize("form", ["file", "recipe"])
def test_train_config(form, job, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("optimizer: {steps: 1}\n")
    name = str(config) if form == "file" else "context-qk-llama2-7b-x8"
    words = settings_of(job, tmp_path / "run", ("optimizer.steps=1",))
    words = [w for w in words if not w.startswith("--optimizer.steps") or form == "recipe"]
    assert megalard("train", "--config", name, *words) == 0
    note = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert note["optimizer"]["steps"] == 1
    # The recipe sets the relations, which the words above leave alone.
    assert note["objective"]["relations"]["qk"] == (0 if form == "file" else 1)


def test_train_preflight(job, tmp_path, capsys):
    assert megalard("train", "--preflight", *settings_of(job, tmp_path / "run", ())) == 0
    assert "preflight passed; nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_preflight_config(job, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("optimizer: {steps: 77}\n")
    words = [w for w in settings_of(job, tmp_path / "run", ()) if "optimizer.steps" not in w]
    assert megalard("preflight", "--config", config, *words) == 0
    assert "for 77 steps" in capsys.readouterr().out


def test_convert_file_size(job, tmp_path):
    """No file is larger than asked, in both directions."""
    words = ("--file-size", "20KB")
    assert megalard("convert", "import", job / "teacher", tmp_path / "sharded", *words) == 0
    assert megalard("convert", "export", tmp_path / "sharded", tmp_path / "hf", *words) == 0
    for folder in (tmp_path / "sharded", tmp_path / "hf"):
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
        # A tensor larger than that has a file of its own: 257 x 32 fp32 values.
        assert len(sizes) > 3 and sorted(sizes)[-3] < 24_000


def test_convert_base(job, moved, tmp_path, capsys):
    words = ("convert", "export", job / "state", tmp_path / "hf")
    assert "--base" in refusal(capsys, *words)
    assert megalard(*words, "--base", moved) == 0
    student = load_file(job / "run" / "student" / "model.safetensors")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(student[name], exported[name]) for name in student)


def test_convert_dry_run(job, tmp_path, capsys):
    for direction, source in (("import", "teacher"), ("export", "sharded")):
        words = ("convert", direction, job / source, tmp_path / "new", "--dry-run")
        assert megalard(*words) == 0
        assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_convert_format(job, tmp_path):
    words = ("convert", "export", job / "state", tmp_path / "adapter", "--format", "peft")
    assert megalard(*words) == 0
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert len(names) == 12 and all("lora_" in name for name in names)


def test_convert_dtype(job, run, tmp_path, capsys):
    """A checkpoint is exported in the dtype of its run, or in the one that is asked for."""
    words = ("checkpoint.export_dtype=bfloat16", "checkpoint.save_every=7")
    trained = run(*words)
    newest = sorted((trained.output / "checkpoints").iterdir())[-1]
    for name, more in (("as-set", ()), ("source", ("--dtype", "source"))):
        assert megalard("convert", "export", newest, tmp_path / name, *more) == 0
    exported, exact = (
        load_file(tmp_path / name / "model.safetensors") for name in ("as-set", "source")
    )
    # Both ways of exporting round once, from fp32.
    assert exported.keys() == trained.student.keys()
    for name, value in trained.student.items():
        assert value.dtype == torch.bfloat16 and torch.equal(exported[name], value), name
        assert exact[name].dtype == torch.float32 and torch.equal(exact[name].bfloat16(), value)
    config = json.loads((tmp_path / "as-set" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    # A model that no run has made, and values that the dtype cannot hold.
    words = ("convert", "export", job / "teacher", tmp_path / "half", "--dtype", "float16")
    assert megalard(*words) == 0
    teacher = load_file(job / "teacher" / "model.safetensors")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[name], value.half()) for name, value in teacher.items())
    large = tmp_path / "large"
    shutil.copytree(job / "teacher", large)
    save_file(teacher | {"model.norm.weight": torch.full((32,), 1e6)}, large / "model.safetensors")
    sentence = refusal(capsys, "convert", "export", large, tmp_path / "inf", "--dtype", "float16")
    assert "model.norm.weight" in sentence and "choose another --dtype" in sentence
    adapter: tuple = ("convert", "export", newest, tmp_path / "adapter", "--format", "peft")
    for words in (("--dtype", "float32"), ("--rounding", "nearest")):
        assert "leave them out" in refusal(capsys, *adapter, *words)


def test_convert_rounding(job, run, tmp_path, capsys):
    """A checkpoint is rounded as its run is, to the same bits, or as it is asked for."""
    words = ("checkpoint.export_dtype=bfloat16", "checkpoint.export_rounding=stochastic")
    trained = run(*words, "checkpoint.save_every=7")
    newest = sorted((trained.output / "checkpoints").iterdir())[-1]
    exported = {}
    for rounding in ("", "stochastic", "nearest"):
        words = ("--rounding", rounding) if rounding else ()
        target = tmp_path / f"to-{rounding}"
        assert megalard("convert", "export", newest, target, *words) == 0
        exported[rounding] = load_file(target / "model.safetensors")
    for name, value in trained.student.items():
        assert torch.equal(exported[""][name], value), name
        assert torch.equal(exported["stochastic"][name], value), name
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(exported["nearest"][name], trained.student[name])
    sentence = refusal(
        *(capsys, "convert", "export", job / "teacher", tmp_path / "x", "--rounding", "stochastic")
    )
    assert "--rounding stochastic is for trained weights" in sentence


def inspected(capsys, *words: object, status: int = 0) -> str:
    capsys.readouterr()
    assert megalard("inspect", *words) == status
    return capsys.readouterr().out


def test_inspect_tensors(job, capsys):
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in inspected(capsys, job / "sharded", "--tensors")
    assert name not in inspected(capsys, job / "sharded")


def test_inspect_no_checksums(job, tmp_path, capsys):
    """A flipped bit is found by reading the file alone."""
    shutil.copytree(job / "sharded", tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").glob("weights-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    inspected(capsys, tmp_path / "damaged", status=1)
    inspected(capsys, tmp_path / "damaged", "--no-checksums")


def test_inspect_base(job, moved, capsys):
    inspected(capsys, job / "state", status=1)
    inspected(capsys, job / "state", "--base", moved)


def test_inspect_no_base(job, moved, capsys):
    inspected(capsys, job / "state", "--no-base")


def test_inspect_json(job, capsys):
    facts = json.loads(inspected(capsys, job / "state", "--json"))
    assert facts["directory"] == str(job / "state")


@pytest.fixture
def changed(job, tmp_path) -> Path:
    """The teacher with all values of six tensors changed by a millionth."""
    shutil.copytree(job / "teacher", tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(file)
    for name in sorted(tensors)[:6]:
        tensors[name] = tensors[name] * (1 + 1e-6)
    save_file(tensors, file, {"format": "pt"})
    return tmp_path / "changed"


def verified(capsys, *words: object) -> tuple[int, str]:
    capsys.readouterr()
    return megalard("verify", *words), capsys.readouterr().out


def test_verify_base(job, moved, capsys):
    student = job / "run" / "student"
    assert verified(capsys, job / "state", student)[0] == 2
    assert verified(capsys, job / "state", student, "--base", moved)[0] == 0


def test_verify_logits(job, changed, capsys):
    status, printed = verified(capsys, job / "teacher", changed, "--logits", job / "heldout.txt")
    assert status == 1 and "logits on 512 tokens" in printed and "the same\n" in printed
    assert "logits on" not in verified(capsys, job / "teacher", changed)[1]


def test_verify_tokens(job, changed, capsys):
    words = ("--logits", job / "heldout.txt", "--tokens", 40)
    assert "logits on 40 tokens" in verified(capsys, job / "teacher", changed, *words)[1]


def test_verify_logits_only(job, changed, capsys):
    words = (job / "teacher", changed, "--logits", job / "heldout.txt")
    assert verified(capsys, *words)[0] == 1
    assert verified(capsys, *words, "--logits-only")[0] == 0


def test_verify_tolerance(job, changed, capsys):
    words = (job / "teacher", changed, "--logits", job / "heldout.txt", "--logits-only")
    assert verified(capsys, *words, "--tolerance", 1e-9)[0] == 1
    assert verified(capsys, *words, "--tolerance", 1e-3)[0] == 0


def test_verify_lines(job, changed, capsys):
    printed = verified(capsys, job / "teacher", changed, "--lines", 2)[1]
    assert "and 4 more" in printed and len(printed.splitlines()) == 4
