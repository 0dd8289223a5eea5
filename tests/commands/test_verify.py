"""``megalard verify`` names every difference of two models, and its exit status is the outcome."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import megalard, noted_bars, one_error
from tests.conversions import to_sharded
from tests.jobs import flip_bit, make_job
from tests.models import make_model
from tests.small_tokenizers import save_byte_tokenizer


def verify(*words: object) -> int:
    """Run the command in this process."""
    return megalard("verify", *words)


def cannot_compare(capsys, *words: object) -> str:
    """Compare what cannot be compared; return the one line on stderr."""
    capsys.readouterr()
    assert verify(*words) == 2
    return one_error(capsys.readouterr().err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ``hf`` and ``sharded``, and with a text."""
    folder = tmp_path_factory.mktemp("verify")
    save_byte_tokenizer(make_model("qwen2", folder / "hf", vocab_size=1003))
    to_sharded(folder / "hf", folder / "sharded")
    (folder / "text.txt").write_text("the mask of the rope and the loss of a row " * 3)
    return folder


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


def test_the_same_model_in_another_form_is_the_same(folder, capsys):
    assert verify(folder / "hf", folder / "sharded") == 0
    count = len(load_file(folder / "hf" / "model.safetensors"))
    assert capsys.readouterr().out == (
        f"{folder / 'hf'} (huggingface) and {folder / 'sharded'} (sharded): {count} tensors, every "
        "bit the same\n"
    )


def test_every_difference_is_named(folder, changed, capsys):
    assert verify(folder / "sharded", changed) == 1
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj.weight: 1 of 1536 elements differ, the first at [3, 5]" in (
        printed
    )
    assert "model.layers.0.self_attn.q_proj.weight: dtype float32 and bfloat16" in printed
    assert f"model.norm.weight: only in {folder / 'sharded'}" in printed
    assert f"extra: only in {changed}" in printed and "4 tensors differ" in printed
    assert verify(folder / "sharded", changed, "--lines", "1") == 1
    assert "and 3 more\n" in capsys.readouterr().out


def test_logits_are_compared_on_text(folder, tmp_path, capsys):
    """A byte-level tokenizer reads the text; one bit of one weight is within the tolerance."""
    one_bit = shutil.copytree(folder / "hf", tmp_path / "one-bit")
    tensors = load_file(one_bit / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, one_bit / "model.safetensors", {"format": "pt"})
    text = folder / "text.txt"
    logits = (folder / "hf", folder / "sharded", "--logits", text, "--tokens", "64")
    assert verify(*logits) == 0
    assert "logits on 64 tokens: |a - b| / |a| = 0.00e+00" in capsys.readouterr().out
    differ = (folder / "hf", one_bit, "--logits", text)
    assert verify(*differ) == 1
    assert verify(*differ, "--logits-only") == 0
    assert verify(*differ, "--logits-only", "--tolerance", "0") == 1
    assert "the same most likely token for 100.00%: different" in capsys.readouterr().out


def test_recorded_checksums_are_compared(folder, tmp_path, capsys):
    copy = shutil.copytree(folder / "sharded", tmp_path / "copy")
    flip_bit(next(copy.glob("weights-*.safetensors")))
    assert "is damaged" in cannot_compare(capsys, folder / "hf", copy)


def test_reading_checksums_shows_its_progress(folder, monkeypatch):
    bars = noted_bars(monkeypatch)
    assert verify(folder / "hf", folder / "sharded") == 0
    total, *counts = bars["checksums"]
    files = [f for f in (folder / "sharded").iterdir() if f.name != "manifest.json"]
    assert sum(counts) == total == sum(file.stat().st_size for file in files)


def test_what_cannot_be_compared_is_status_2(folder, tmp_path, capsys):
    hf, text = folder / "hf", folder / "text.txt"
    other = make_model("qwen2", tmp_path / "other", vocab_size=300)
    for words, sentence in (
        ((hf, "/nowhere"), "no model directory at /nowhere"),
        ((hf, hf, "--logits-only"), "--logits-only needs --logits TEXT"),
        ((hf, other, "--logits", text), f"{other} has 300 entries"),
        ((hf, hf, "--logits", text, "--tokens", "0"), "0 tokens are too few to compare logits on"),
        (
            (hf, hf, "--logits", text, "--tokens", "-3"),
            "-3 tokens are too few to compare logits on",
        ),
    ):
        assert sentence in cannot_compare(capsys, *words)
    small = make_model("qwen2", tmp_path / "small", vocab_size=100)
    save_byte_tokenizer(small)
    line = cannot_compare(capsys, small, small, "--logits", text)
    assert "in the tokenizer of" in line


@pytest.mark.parametrize("option", [("--lines", "-1"), ("--tolerance", "nan")], ids=str)
def test_numbers_that_compare_nothing_are_refused(option, folder, capsys):
    with pytest.raises(SystemExit) as caught:
        verify(folder / "hf", folder / "hf", *option)
    assert caught.value.code == 2
    assert f"argument {': '.join(option)}: give 0 or more" in capsys.readouterr().err


def test_the_tokenizer_of_the_second_model_is_used_if_the_first_has_none(tmp_path, capsys):
    job = make_job(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(job / "model" / name, bare)
    assert verify(bare, job / "model", "--logits", job / "heldout.txt") == 0
    line = cannot_compare(capsys, bare, bare, "--logits", job / "heldout.txt")
    assert "has neither tokenizer.json nor tokenizer.model" in line


def test_an_error_of_the_system_is_one_sentence(folder, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError(5, "Input/output error", "a file")

    monkeypatch.setattr("megalard.checkpoint.compare.tensor_differences", fail)
    assert verify(folder / "hf", folder / "hf") == 2
    printed = capsys.readouterr().err
    assert printed.endswith("megalard: error: cannot read or write a file: Input/output error\n")
    assert "Traceback" not in printed


def test_a_crash_is_not_taken_for_a_difference(folder, monkeypatch, capsys):
    def crash(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr("megalard.checkpoint.compare.tensor_differences", crash)
    assert verify(folder / "hf", folder / "hf") == 2
    assert "RuntimeError: a bug" in capsys.readouterr().err
