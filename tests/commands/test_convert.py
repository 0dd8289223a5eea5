"""The three checkpoint tools from the command line."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.parallel import agreement
from tests.jobs import save_tokenizer
from tests.models import make_model
from tests.ranks import run_ranks

CHECKOUT = Path(__file__).parents[2]


def tool(name: str):
    """A script's ``main``."""
    module = importlib.import_module(f"tools.{name}")
    return lambda *arguments: module.main([str(argument) for argument in arguments])


convert, verify, inspect = map(tool, ("convert_hf", "verify_checkpoint", "inspect_checkpoint"))


def launch(ranks: int, *command: object) -> None:
    """A script's command, by ranks that are forked: torchrun's import all anew."""
    run_ranks(ranks, _run_script, [str(word) for word in command])


def _run_script(command: list[str]) -> None:
    sys.argv = command
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(CHECKOUT / command[0]), run_name="__main__")
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``hf`` and, written by torchrun's two processes, ``sharded``."""
    folder = tmp_path_factory.mktemp("tools")
    make_model("qwen2", folder / "hf", vocab_size=1003)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["tools/convert_hf.py", "import", str(folder / "hf"), str(folder / "sharded")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    subprocess.run([*start, *command], check=True, env=environment, cwd=CHECKOUT)
    return folder


def test_there_and_back(folder, tmp_path, capsys):
    assert convert("export", folder / "sharded", tmp_path / "back", "--file-size", "20KB") == 0
    assert len(list(tmp_path.glob("back/*.safetensors"))) > 3
    assert verify(folder / "hf", tmp_path / "back") == 0
    assert "every bit the same" in capsys.readouterr().out
    assert verify(folder / "hf", folder / "sharded") == 0


def test_several_processes_export_the_files_between_them(folder, tmp_path):
    command = ("export", folder / "sharded", tmp_path / "back", "--file-size", "20KB")
    launch(2, "tools/convert_hf.py", *command)
    assert verify(folder / "hf", tmp_path / "back") == 0


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    for command in (("import", folder / "hf"), ("export", folder / "sharded")):
        assert convert(*command, tmp_path / "out", "--dry-run") == 0
        assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    # it refuses what the conversion would refuse
    assert convert("import", folder / "nowhere", tmp_path / "out", "--dry-run") == 1


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert convert("export", folder / "sharded", tmp_path) == 1
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("command", [("import", "hf"), ("export", "sharded")], ids=lambda c: c[0])
def test_neighbours_of_the_target_are_left_alone(command, folder, tmp_path, capsys):
    """It is written beside its name; a folder there that no conversion left is somebody's."""
    arguments = (command[0], folder / command[1], tmp_path / "out")
    for name in ("out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    assert convert(*arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "it is in the way, move it elsewhere" in line and "out.partial" in line
    assert len(list(tmp_path.glob("*/precious"))) == 2 and not (tmp_path / "out").exists()
    # but what a killed one left is removed
    (tmp_path / "out.partial" / "precious").rename(tmp_path / "out.partial" / ".unfinished")
    assert convert(*arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old"]
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("leads_to", ["empty", "nowhere"])
def test_a_link_is_refused_as_a_target(leads_to, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / leads_to)
    for option in ((), ("--dry-run",)):
        assert convert("export", folder / "sharded", tmp_path / "link", *option) == 1
        assert "link is a link: give the directory it leads to" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_a_target_that_appears_meanwhile_is_not_replaced(folder, tmp_path, monkeypatch, capsys):
    def slow(self, *arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")

    monkeypatch.setattr("megalard.checkpoint.open.Model.check_sums", slow)
    assert convert("export", folder / "sharded", tmp_path / "out") == 1
    assert "Directory not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_nothing_has_its_name_before_its_source_is_known_to_be_whole(folder, tmp_path, monkeypatch):
    seen = []

    def slow(self, *arguments):
        seen.append((tmp_path / "out").exists())

    monkeypatch.setattr("megalard.checkpoint.open.Model.check_sums", slow)
    agree = agreement.gather_objects
    monkeypatch.setattr(
        agreement,
        "gather_objects",
        lambda *args: seen.append((tmp_path / "out").exists()) or agree(*args),
    )
    assert convert("import", folder / "sharded", tmp_path / "out") == 0
    assert len(seen) > 1 and not any(seen[:-1])


def test_a_target_that_cannot_be_made_is_told_by_a_dry_run_too(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "mounted").mkdir()
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
        patch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
        patch.chdir(tmp_path)
        (tmp_path / "locked").mkdir()
        for target, sentence in (
            (tmp_path / "file" / "x", "is no directory"),
            (tmp_path / "mounted", "choose a directory in it"),
            (tmp_path / "locked" / "x", "cannot write into"),
        ):
            for command in (("import", folder / "hf"), ("export", folder / "sharded")):
                assert convert(*command, target, "--dry-run") == 1
                assert sentence in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert convert("export", folder / "sharded", ".", "--dry-run") == 1
    assert "choose a directory in it" in capsys.readouterr().err
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("import", "/nowhere", "OUT"), "no model directory at /nowhere"),
        (("export", "SHARDED", "OUT", "--file-size", "inf"), '"inf" is no size'),
        (("export", "SHARDED", "OUT", "--file-size", "big"), '"big" is no size'),
        (("export", "SHARDED", "OUT", "--format", "peft"), "is no checkpoint of a run"),
    ],
)
def test_bad_input_is_told_in_one_sentence(arguments, sentence, folder, tmp_path, capsys):
    places = {"OUT": tmp_path / "out", "SHARDED": folder / "sharded"}
    assert convert(*(places.get(word, word) for word in arguments)) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("megalard: error: ") and printed.count("\n") == 1
    assert sentence in printed and not (tmp_path / "out").exists()


@pytest.fixture
def changed(folder, tmp_path):
    """The model with one bit changed, one tensor of another dtype, one missing and one more."""
    path = tmp_path / "changed"
    path.mkdir()
    (path / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    tensors = load_file(folder / "hf" / "model.safetensors")
    bits = tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)
    bits[3, 5] ^= 1
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    del tensors["model.norm.weight"]
    tensors["extra"] = torch.zeros(2)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_verify_names_every_difference(folder, changed, capsys):
    assert verify(folder / "sharded", changed) == 1
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj.weight: 1 of 1536 elements differ, the first at [3, 5]" in (
        printed
    )
    assert "model.layers.0.self_attn.q_proj.weight: dtype float32 and bfloat16" in printed
    assert f"model.norm.weight: only in {folder / 'sharded'}" in printed
    assert f"extra: only in {changed}" in printed and "4 tensors differ" in printed
    assert verify(folder / "hf", "/nowhere") == 2


def test_verify_compares_logits_on_text(folder, changed, tmp_path, capsys):
    """A byte-level tokenizer reads the text; one bit of one weight is within the tolerance."""
    one_bit = shutil.copytree(folder / "hf", tmp_path / "one-bit")
    tensors = load_file(one_bit / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, one_bit / "model.safetensors", {"format": "pt"})
    save_tokenizer(folder / "hf")
    text = tmp_path / "text.txt"
    text.write_text("the mask of the rope and the loss of a row " * 3)
    logits = (folder / "hf", folder / "sharded", "--logits", text, "--tokens", "64")
    assert verify(*logits) == 0
    assert "logits on 64 tokens: |a - b| / |a| = 0.00e+00" in capsys.readouterr().out
    differ = (folder / "hf", one_bit, "--logits", text)
    assert verify(*differ) == 1
    assert verify(*differ, "--logits-only") == 0
    assert verify(*differ, "--logits-only", "--tolerance", "0") == 1
    assert "the same first choice for 100.00%: different" in capsys.readouterr().out


def test_a_conversion_shows_its_progress_on_a_terminal(folder, tmp_path, capsys, monkeypatch):
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(variable, "1")
    assert convert("export", folder / "sharded", tmp_path / "out") == 0
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    size = sum(x.nbytes for x in load_file(tmp_path / "out" / "model.safetensors").values()) / 2**10
    assert "export sharded" in printed and f"{size:.1f}/{size:.1f} KiB" in printed, printed


def _progress_of_rank_0(command: list[str], file: str) -> None:
    advanced = []
    bar = "megalard.progress.progress_bar"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bar, lambda title, total, axis: _noted(total, axis, advanced))
        _run_script(command)
    if advanced:
        Path(file).write_text(json.dumps(advanced))


@contextmanager
def _noted(total, axis, advanced):
    counts = []
    yield counts.append
    if axis.rank == 0:
        advanced += [total, sum(counts)]


@pytest.mark.parametrize("file_size", ["4GiB", "100KB"])
def test_progress_of_several_processes_ends_where_it_should(file_size, folder, tmp_path):
    command = ("export", folder / "sharded", tmp_path / "back", "--file-size", file_size)
    words = [str(word) for word in ("tools/convert_hf.py", *command)]
    run_ranks(2, _progress_of_rank_0, words, str(tmp_path / "seen"))
    total, counted = json.loads((tmp_path / "seen").read_text())
    # the files' headers are counted too
    assert total < counted < 1.05 * total


def test_inspect_tells_what_is_in_it(folder, capsys):
    assert inspect(folder / "sharded", "--tensors") == 0
    printed = capsys.readouterr().out
    for words in ("2 ranks (dp 1 x cp 1 x tp 2)", "checksums    hold", "complete     yes"):
        assert words in printed
    assert "model.embed_tokens.weight  F32 [1003, 32]  weights-00000-000.safetensors" in printed
    assert inspect(folder / "sharded", "--json", "--no-checksums") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["trained"] == "nothing" and facts["checksums"] == "not compared"


def test_inspect_finds_damage(folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shard = damaged(folder, copy)
    assert inspect(copy) == 1
    assert f"{shard} is damaged" in capsys.readouterr().out
    shard.unlink()
    assert inspect(copy) == 1
    assert "NOT USABLE" in capsys.readouterr().out
    assert inspect(copy, "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["complete"] == "no" and f"{copy} lacks {shard.name}" in facts["problem"]


def test_inspect_tells_what_another_directory_is(folder, tmp_path, capsys):
    assert inspect(folder / "hf") == 0
    printed = capsys.readouterr().out
    for words in ("a Hugging Face model", "qwen2, 3 layers of 32", "kB)", "none are recorded"):
        assert words in printed
    assert inspect(tmp_path) == 1
    assert f"{tmp_path} has no config.json" in capsys.readouterr().out


def damaged(folder: Path, copy: Path) -> Path:
    """The sharded model with one bit of a tensor changed; gives the file that has it."""
    shutil.copytree(folder / "sharded", copy)
    shard = copy / "weights-00001-000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-9] ^= 4
    shard.write_bytes(content)
    return shard


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_damaged_checkpoint_is_not_converted(command, folder, tmp_path, capsys):
    """New checksums would vouch for what the old ones deny."""
    shard = damaged(folder, tmp_path / "copy")
    assert convert(command, tmp_path / "copy", tmp_path / "out") == 1
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if "error" in line]
    assert f"{shard} is damaged or of another model" in line
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("name", ["convert_hf", "verify_checkpoint", "inspect_checkpoint"])
def test_help_says_what_a_tool_does(name, capsys):
    with pytest.raises(SystemExit) as caught:
        tool(name)("--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert f"python tools/{name}.py" in printed and len(printed.splitlines()) > 15
