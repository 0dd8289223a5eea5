"""``megalard convert``: there and back, on several processes, without overwriting anything."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megalard.parallel import agreement
from megalard.training.run_folder import checkpoint_path
from tests.command_line import megalard, megalard_on_ranks, refusal
from tests.jobs import arguments, flip_bit, make_job, train
from tests.models import make_model
from tests.ranks import run_ranks


def convert(*words: object) -> int:
    """Run the command in this process."""
    return megalard("convert", *words)


def verify(*words: object) -> int:
    """Compare two models."""
    return megalard("verify", *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ``hf`` and, written by two ranks, ``sharded``."""
    folder = tmp_path_factory.mktemp("convert")
    make_model("qwen2", folder / "hf", vocab_size=1003)
    megalard_on_ranks(2, "convert", "import", folder / "hf", folder / "sharded")
    return folder


def test_there_and_back(folder, tmp_path, capsys):
    assert convert("export", folder / "sharded", tmp_path / "back", "--file-size", "20KB") == 0
    assert len(list(tmp_path.glob("back/*.safetensors"))) > 3
    assert verify(folder / "hf", tmp_path / "back") == 0
    assert "every bit the same" in capsys.readouterr().out
    assert verify(folder / "hf", folder / "sharded") == 0


@pytest.mark.parametrize("family", ["olmo2", "phi3-longrope", "ministral"])
def test_other_families_go_there_and_back(family, tmp_path, capsys):
    model = make_model(family, tmp_path / "model")
    assert convert("import", model, tmp_path / "sharded") == 0
    assert convert("export", tmp_path / "sharded", tmp_path / "back") == 0
    assert verify(model, tmp_path / "back") == 0
    tensors = load_file(model / "model.safetensors").keys()
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors


def test_several_processes_share_the_files_of_an_export(folder, tmp_path):
    words = ("export", folder / "sharded", tmp_path / "back", "--file-size", "20KB")
    megalard_on_ranks(2, "convert", *words)
    assert verify(folder / "hf", tmp_path / "back") == 0


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    for words in (("import", folder / "hf"), ("export", folder / "sharded")):
        assert convert(*words, tmp_path / "out", "--dry-run") == 0
        assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    # It refuses what the conversion would refuse.
    assert convert("import", folder / "nowhere", tmp_path / "out", "--dry-run") == 1


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    line = refusal(capsys, "convert", "export", folder / "sharded", tmp_path)
    assert f"{tmp_path} is not empty: choose another directory" in line
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("words", [("import", "hf"), ("export", "sharded")], ids=lambda w: w[0])
def test_neighbors_of_the_target_are_left_alone(words, folder, tmp_path, capsys):
    """The target is written under a name next to it, where somebody may have a folder."""
    words = ("convert", words[0], folder / words[1], tmp_path / "out")
    for name in ("out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    line = refusal(capsys, *words)
    assert "is in the way" in line and "out.partial" in line
    assert len(list(tmp_path.glob("*/precious"))) == 2 and not (tmp_path / "out").exists()
    # What a killed conversion left is removed.
    (tmp_path / "out.partial" / "precious").rename(tmp_path / "out.partial" / ".unfinished")
    assert megalard(*words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old"]
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("leads_to", ["empty", "nowhere"])
def test_a_link_is_refused_as_a_target(leads_to, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / leads_to)
    for option in ((), ("--dry-run",)):
        words = ("export", folder / "sharded", tmp_path / "link", *option)
        expected = "link is a link: give the directory it leads to"
        assert expected in refusal(capsys, "convert", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_a_target_that_appears_meanwhile_is_not_replaced(folder, tmp_path, monkeypatch, capsys):
    def slow(self, *arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")

    monkeypatch.setattr("megalard.checkpoint.open.StoredModel.check_sums", slow)
    line = refusal(capsys, "convert", "export", folder / "sharded", tmp_path / "out")
    assert "Directory not empty" in line
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_the_target_gets_its_name_after_all_checksums_hold(folder, tmp_path, monkeypatch):
    exists = []

    def slow(self, *arguments):
        exists.append((tmp_path / "out").exists())

    monkeypatch.setattr("megalard.checkpoint.open.StoredModel.check_sums", slow)
    agree = agreement.gather_objects
    monkeypatch.setattr(
        agreement,
        "gather_objects",
        lambda *args: exists.append((tmp_path / "out").exists()) or agree(*args),
    )
    assert convert("import", folder / "sharded", tmp_path / "out") == 0
    assert len(exists) > 1 and not any(exists[:-1])


def test_a_target_that_cannot_be_made_is_refused_by_a_dry_run_too(
    folder, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    for name in ("mounted", "locked", "empty"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    for target, sentence in (
        (tmp_path / "file" / "x", "is not a directory"),
        (tmp_path / "mounted", "choose a directory inside it"),
        (tmp_path / "locked" / "x", "cannot write into"),
    ):
        for words in (("import", folder / "hf"), ("export", folder / "sharded")):
            assert sentence in refusal(capsys, "convert", *words, target, "--dry-run")
    monkeypatch.chdir(tmp_path / "empty")
    line = refusal(capsys, "convert", "export", folder / "sharded", ".", "--dry-run")
    assert "choose a directory inside it" in line


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("import", "/nowhere", "OUT"), "no model directory at /nowhere"),
        (("export", "SHARDED", "OUT", "--file-size", "inf"), "'inf' is not a size"),
        (("export", "SHARDED", "OUT", "--file-size", "big"), "'big' is not a size"),
        (("export", "SHARDED", "OUT", "--format", "peft"), "is not a run's checkpoint (sharded)"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(words, sentence, folder, tmp_path, capsys):
    places = {"OUT": tmp_path / "out", "SHARDED": folder / "sharded"}
    assert sentence in refusal(capsys, "convert", *(places.get(word, word) for word in words))
    assert not (tmp_path / "out").exists()


def test_a_conversion_shows_its_progress_on_a_terminal(folder, tmp_path, capsys, monkeypatch):
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(variable, "1")
    assert convert("export", folder / "sharded", tmp_path / "out") == 0
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    size = sum(x.nbytes for x in load_file(tmp_path / "out" / "model.safetensors").values()) / 2**10
    assert "export sharded" in printed and f"{size:.1f}/{size:.1f} KiB" in printed, printed


def _convert_noting_progress(words: list[str], file: str) -> None:
    advanced: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        bar = "megalard.progress.byte_bar"
        patch.setattr(bar, lambda title, total, axis: _noted(total, axis, advanced))
        assert megalard(*words) == 0
    if advanced:
        Path(file).write_text(json.dumps(advanced))


@contextmanager
def _noted(total, axis, advanced):
    counts = []
    yield counts.append
    if axis.rank == 0:
        advanced += [total, sum(counts)]


@pytest.mark.parametrize("file_size", ["4GiB", "100KB"])
def test_the_progress_of_several_processes_ends_at_its_total(file_size, folder, tmp_path):
    words = ("export", folder / "sharded", tmp_path / "back", "--file-size", file_size)
    words = ["convert", *map(str, words)]
    run_ranks(2, _convert_noting_progress, words, str(tmp_path / "progress"))
    total, counted = json.loads((tmp_path / "progress").read_text())
    # The headers of the files are counted too.
    assert total < counted < 1.05 * total


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_damaged_checkpoint_is_not_converted(direction, folder, tmp_path, capsys):
    """New checksums would hide that the old ones do not hold."""
    shutil.copytree(folder / "sharded", tmp_path / "copy")
    shard = tmp_path / "copy" / "weights-00001-000.safetensors"
    flip_bit(shard)
    line = refusal(capsys, "convert", direction, tmp_path / "copy", tmp_path / "out")
    assert f"{shard} is damaged or belongs to another model" in line
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


SAVE = ("checkpoint.save_every=1", "optimizer.steps=2", "optimizer.warmup_steps=1")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job whose run in ``run`` has trained LoRA and saved two checkpoints."""
    folder = make_job(tmp_path_factory.mktemp("run"))
    train(arguments(folder, folder / "run", *SAVE))
    return folder


@pytest.fixture
def checkpoint(job):
    """The last checkpoint of the run."""
    return checkpoint_path(job / "run" / "checkpoints", 2)


def test_the_adapter_of_a_run_is_its_merged_export(job, checkpoint, tmp_path, capsys):
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


def test_a_damaged_run_gives_no_adapter(checkpoint, tmp_path, capsys):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shard = next(copy.glob("weights-*.safetensors"))
    flip_bit(shard)
    words = ("export", copy, tmp_path / "out", "--format", "peft")
    assert f"{shard} is damaged" in refusal(capsys, "convert", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_base_of_another_shape_is_named(checkpoint, tmp_path, capsys):
    other = make_model("llama", tmp_path / "other", vocab_size=257, intermediate_size=40)
    words = ("export", checkpoint, tmp_path / "out", "--base", other)
    assert f"in {other} has shape [40, 32], but" in refusal(capsys, "convert", *words)
