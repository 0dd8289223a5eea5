"""Conversions: no tensor is lost, memory stays small, and bad targets and sizes are refused."""

from __future__ import annotations

import ctypes
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megalard.checkpoint.build import check_complete, full_slices
from megalard.checkpoint.convert import check_target, parse_size, unknown_tensors
from megalard.checkpoint.inspection import describe_checkpoint
from megalard.checkpoint.open import open_model
from megalard.checkpoint.sharded.manifest import read_manifest
from megalard.checkpoint.sharded.save_load import checkpoint_axis
from megalard.checkpoint.weights import size_of
from megalard.errors import UserError
from megalard.files.safetensors import Entry, write_tensor_file
from megalard.model.spec import read_spec
from megalard.parallel.mesh import build_mesh
from megalard.training.monitor import peak_memory_bytes
from megalard.training.run_folder import checkpoint_path
from tests.command_line import user_error
from tests.conversions import export_another_norm_eps, to_adapter, to_hugging_face, to_sharded
from tests.jobs import arguments, make_job, train
from tests.models import FAMILIES, make_model
from tests.mounts import mounted
from tests.ranks import run_ranks

_M_MMAP_THRESHOLD = -3


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_tensor_is_lost(ranks, tmp_path):
    """Neither a tensor without elements nor one with a name that optimizer tensors have."""
    source = make_model("llama", tmp_path / "source")
    more = {
        "empty": torch.zeros(0, 5),
        "optimizer.scale": torch.arange(3.0),
        "rng.x": torch.ones(2),
    }
    tensors = load_file(source / "model.safetensors") | more
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    run_ranks(ranks, _there_and_back, str(tmp_path), ranks)
    result = load_file(tmp_path / "back" / "model.safetensors")
    assert result.keys() == tensors.keys()
    for name, value in tensors.items():
        assert result[name].shape == value.shape and torch.equal(result[name], value), name
    assert "optimizer" not in describe_checkpoint(read_manifest(tmp_path / "sharded"))["tensors"]
    model = open_model(source)
    assert sorted(unknown_tensors(model.weights, model.spec)) == sorted(more)


def _there_and_back(folder: str, ranks: int) -> None:
    mesh = build_mesh("cpu", ranks)
    to_sharded(f"{folder}/source", f"{folder}/sharded", mesh, checkpoint_axis(mesh))
    to_hugging_face(f"{folder}/sharded", f"{folder}/back", mesh.world)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_exported_config_as_the_original(family, tmp_path):
    make_model(family, tmp_path / "source")
    to_sharded(tmp_path / "source", tmp_path / "sharded")
    to_hugging_face(tmp_path / "sharded", tmp_path / "out")
    ours, theirs = (
        AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("out", "source")
    )
    # "type" is the old name of "rope_type", which transformers keeps where a file has it.
    rope = {key: value for key, value in ours.pop("rope_parameters").items() if key != "type"}
    assert rope == theirs.pop("rope_parameters")
    head_dim = ours["hidden_size"] // ours["num_attention_heads"]
    del theirs["_name_or_path"]
    for key, value in theirs.items():
        expected = head_dim if key == "head_dim" and value is None else value
        assert ours.get(key, value) == expected, key


def test_a_model_that_lacks_a_tensor_is_not_converted(tmp_path):
    source = make_model("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors")
    model = open_model(source)
    assert "has no tensor model.norm.weight" in user_error(
        check_complete, model.weights, model.spec
    )
    user_error(to_sharded, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_reads_as_another_model_is_refused(tmp_path, monkeypatch):
    source = make_model("llama", tmp_path / "source")
    to_sharded(source, tmp_path / "sharded")
    export_another_norm_eps(monkeypatch)
    sentence = user_error(to_hugging_face, tmp_path / "sharded", tmp_path / "out")
    assert "its norm_eps is read as 0.5" in sentence and not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_model(tmp_path):
    """0.25 GB in tensors of up to 16 MB, of which two are in memory, in both directions."""
    run_ranks(1, _convert_within, str(tmp_path), 40 * 2**20)


def _convert_within(folder: str, allowed: int) -> None:
    # By chance glibc would keep 20 to 60 MB that have been freed. Only live memory counts here.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8000}
    config = FAMILIES["llama"][0](**shape, num_hidden_layers=7, tie_word_embeddings=True)
    source = Path(folder) / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    slices = full_slices(read_spec(source))
    entries = {name: Entry(torch.bfloat16, held.full_shape) for name, held in slices.items()}
    zeros = (torch.zeros(entry.shape, dtype=entry.dtype) for entry in entries.values())
    size, _ = write_tensor_file(source / "model.safetensors", entries, zeros, {"format": "pt"})
    assert size > 250e6
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * os.sysconf("SC_PAGESIZE")
    to_sharded(source, f"{folder}/sharded")
    to_hugging_face(f"{folder}/sharded", f"{folder}/back")
    assert peak_memory_bytes(torch.device("cpu")) - before < allowed


def test_a_full_disk_stops_a_conversion_and_leaves_nothing(tmp_path):
    job = make_job(tmp_path / "job")
    options = ("optimizer.steps=1", "checkpoint.save_every=1")
    train(arguments(job, tmp_path / "run", *options))
    source = open_model(job / "model")
    trained = open_model(checkpoint_path(tmp_path / "run" / "checkpoints", 1))
    chance = random.Random(0)
    for convert, model, needed in (
        (to_sharded, source, size_of(source.weights)),
        (to_hugging_face, source, size_of(source.weights)),
        (to_adapter, trained, size_of(trained.trained)),
    ):
        for _ in range(8):
            size = chance.randrange(4096, needed + 4096)  # the small files need more
            with mounted(tmp_path / "small", f"size={size}") as disk:
                with pytest.raises(UserError, match="No space left on device"):
                    convert(model, disk / "out")
                assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000000", 10**6),
        ("500MB", 500 * 10**6),
        ("4GiB", 2**32),
        ("4 GiB", 2**32),
        ("4G", 2**32),
        ("1.5kib", 1536),
        ("20KB", 20_000),
        ("2TB", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes_are_read_in_either_unit(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["big", "", "inf", "nan", "4XB", "GiB", "1e400"])
def test_text_that_is_not_a_size_is_refused(text):
    assert user_error(parse_size, text) == (f"{text!r} is not a size: write it as 4GiB or 500MB")


@pytest.mark.parametrize("text", ["0", "-1GB", "0.5"])
def test_a_size_below_one_byte_is_refused(text):
    assert f"a file size of {text!r} is too small" in user_error(parse_size, text)


def test_a_target_that_cannot_be_made_is_refused(tmp_path):
    check_target(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name, sentence in (
        ("full", "is not empty: choose another directory"),
        ("file", "is not empty: choose another directory"),
        ("link", "is a link: give the directory it leads to"),
        ("file/x", "is not a directory, so "),
    ):
        assert sentence in user_error(check_target, tmp_path / name)


def test_a_target_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch):
    """The directory is written under another name and then renamed."""
    for name in ("mounted", "empty", "locked"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    sentence = "cannot be replaced: choose a directory inside it"
    assert sentence in user_error(check_target, tmp_path / "mounted")
    monkeypatch.chdir(tmp_path / "empty")
    assert sentence in user_error(check_target, ".")
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    assert f"cannot write into {tmp_path / 'locked'}: choose another place" in user_error(
        check_target, tmp_path / "locked" / "x"
    )


def test_an_adapter_s_export_has_the_lengths_of_the_student(tmp_path):
    """An adapter without companion files gets those of its base, with the student's window."""
    base = make_model("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    window = config["max_position_embeddings"]
    limits = {"max_length": window, "temperature": 0.5}
    (base / "generation_config.json").write_text(json.dumps(limits))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, 2),
        },
        adapter / "adapter_model.safetensors",
    )
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    scaling = {"rope_type": "linear", "factor": 4.0}
    changes = {"max_position_embeddings": 4 * window, "rope_scaling": scaling}
    config.pop("rope_parameters", None)
    (adapter / "config.json").write_text(json.dumps({**config, **changes}))
    to_hugging_face(adapter, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {**limits, "max_length": 4 * window}


def test_an_import_and_an_export_copy_the_companion_files(tmp_path):
    source = make_model("llama", tmp_path / "source")
    (source / "tokenizer.json").write_text('{"a": "tokenizer"}')
    to_sharded(source, tmp_path / "sharded")
    to_hugging_face(tmp_path / "sharded", tmp_path / "out")
    for name in ("tokenizer.json", "generation_config.json"):
        for folder in ("sharded", "out"):
            assert (tmp_path / folder / name).read_bytes() == (source / name).read_bytes()
