"""Hugging Face directories: a rank reads only its slices, and damage is one sentence."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.checkpoint import huggingface
from megalard.checkpoint.companions import Companion
from megalard.checkpoint.huggingface import (
    HuggingFaceWeights,
    bytes_of_rank,
    plan_files,
    write_huggingface,
)
from megalard.checkpoint.weights import size_of
from megalard.checkpoint.write_options import WriteOptions
from megalard.parallel.mesh import Axis
from tests.command_line import user_error
from tests.logits import load
from tests.models import make_model

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model in one file."""
    return make_model("llama-biases", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the model, which a test may damage."""
    return shutil.copytree(model, tmp_path / "copy")


class SliceSpy:
    """Stands for a slice of safetensors and notes what is read of it."""

    def __init__(self, part, name, log):
        self.part, self.name, self.log = part, name, log

    def get_shape(self):
        return self.part.get_shape()

    def __getitem__(self, index):
        value = self.part[index]
        self.log.append((self.name, value))
        return value


class FileSpy:
    """Stands for an open file; tensors can be read as slices only."""

    def __init__(self, file, log):
        self.file, self.log = file, log

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return SliceSpy(self.file.get_slice(name), name, self.log)


@pytest.fixture
def reads(monkeypatch):
    """Every (name, tensor) that is read from files from now on."""
    log = []
    open_file = huggingface._open
    monkeypatch.setattr(huggingface, "_open", lambda path: FileSpy(open_file(path), log))
    return log


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_reads_only_its_slices(tp, model, reads):
    """No tensor is read twice or beyond its slice, and the slices make up the tensors."""
    full = load_file(model / "model.safetensors")
    parts = {name: [] for name in full}
    for rank in range(tp):
        reads.clear()
        decoder = load(model, Axis(None, rank, tp))
        assert sorted(name for name, _ in reads) == sorted(full)
        for name, value in reads:
            held = decoder.slices[name]
            assert tuple(value.shape) == held.local_shape
            if held.dim is None:
                assert torch.equal(value, full[name])
                continue
            # An uneven vocabulary may cost one row more.
            assert value.numel() <= math.ceil(full[name].numel() * held.replicas / tp) + 32
            stop = held.start + held.length
            index = torch.arange(held.start, stop)
            assert torch.equal(value, full[name].index_select(held.dim, index))
            parts[name].append((held, value))
    for name, slices in parts.items():
        if slices:
            held = slices[0][0]
            joined = torch.cat([v for _, v in slices[:: held.replicas]], held.dim)
            assert torch.equal(joined, full[name])


def test_a_directory_without_weight_files_is_refused(copy):
    (copy / "model.safetensors").unlink()
    assert (
        user_error(HuggingFaceWeights, copy) == f"{copy} has no .safetensors files: check the path"
    )


def test_pickled_weights_must_be_converted(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "convert its .bin files to safetensors" in user_error(HuggingFaceWeights, copy)


@pytest.mark.parametrize("length", [0, 5, 500, -100])
def test_a_truncated_file_is_named(length, copy):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:length])
    assert f"{path} is truncated or damaged" in user_error(HuggingFaceWeights, copy)


def test_a_tensor_in_two_files_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    save_file({Q: tensors[Q]}, copy / "another.safetensors")
    sentence = user_error(HuggingFaceWeights, copy)
    assert f"tensor {Q} is in both another.safetensors and model-1.safetensors" in sentence


def test_other_files_next_to_the_single_file_are_not_read(copy):
    """As in transformers: Mistral's consolidated.safetensors, and files that macOS leaves."""
    expected = HuggingFaceWeights(copy).names()
    save_file({"tok_embeddings.weight": torch.ones(2)}, copy / "consolidated.safetensors")
    assert HuggingFaceWeights(copy).names() == expected
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    (copy / "consolidated.safetensors").unlink()
    (copy / "._weights.safetensors").write_bytes(b"no header")
    assert HuggingFaceWeights(copy).names() == expected


def split(folder, *, index: dict | str | None = None) -> None:
    """Cut the model's file into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    content = index if index is not None else {"weight_map": weight_map}
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_file_that_the_index_names_is_missing(copy):
    split(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    sentence = user_error(HuggingFaceWeights, copy)
    assert sentence == (
        f"{copy} lacks model-00002-of-00002.safetensors, which its index names: download it again"
    )


@pytest.mark.parametrize(
    "index",
    ["{ cut", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}'],
)
def test_a_damaged_index_is_named(index, copy):
    split(copy, index=index)
    assert "is not a safetensors index" in user_error(HuggingFaceWeights, copy)


def test_files_that_the_index_does_not_name_are_not_read(copy, model):
    split(copy)
    shutil.copy(model / "model.safetensors", copy / "consolidated.safetensors")
    full = load_file(model / "model.safetensors")
    weights = HuggingFaceWeights(copy)
    assert sorted(weights.names()) == sorted(full)
    assert all(torch.equal(weights.read(name), value) for name, value in full.items())


def test_an_index_that_leads_out_of_the_directory_is_refused(copy):
    split(copy, index={"weight_map": {"a": "../secret.safetensors"}})
    sentence = user_error(HuggingFaceWeights, copy)
    assert "names the file '../secret.safetensors' outside its directory" in sentence


@pytest.mark.parametrize("dtype", [torch.uint16, torch.complex64])
def test_a_dtype_that_is_not_read_is_named(dtype, copy):
    tensors = load_file(copy / "model.safetensors") | {"extra": torch.zeros(3, dtype=dtype)}
    save_file(tensors, copy / "model.safetensors")
    name = {torch.uint16: "U16", torch.complex64: "C64"}[dtype]
    sentence = user_error(HuggingFaceWeights, copy)
    assert f"has the tensor 'extra' of dtype '{name}', which is not supported" in sentence


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(copy):
    weights = HuggingFaceWeights(copy)
    os.truncate(copy / "model.safetensors", 5000)
    sentence = user_error(lambda: [weights.read(name) for name in weights.names()])
    assert f"{copy / 'model.safetensors'} is truncated or damaged" in sentence
    assert "it became shorter while it was read" in sentence


def test_a_missing_tensor_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors[Q]
    save_file(tensors, copy / "model.safetensors")
    assert f"has no tensor {Q}, which its config.json implies" in user_error(load, copy)


def test_a_tensor_of_another_shape_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors[Q] = tensors[Q][:-8].contiguous()
    save_file(tensors, copy / "model.safetensors")
    sentence = user_error(load, copy)
    assert f"tensor {Q}" in sentence
    assert "has shape [24, 32], but config.json implies [32, 32]" in sentence


def test_a_directory_is_written_complete_with_an_index(model, tmp_path):
    weights = HuggingFaceWeights(model)
    (tmp_path / "tokenizer.json").write_text("x")
    companions = (
        Companion("tokenizer.json", tmp_path / "tokenizer.json"),
        Companion("folder/template.jinja", tmp_path / "tokenizer.json", content="y"),
    )
    options = WriteOptions(companions, file_bytes=20_000)
    write_huggingface(tmp_path / "out", weights, {"a": 1}, options)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = {f.name: load_file(f) for f in files}
    assert index["weight_map"] == {name: file for file, part in tensors.items() for name in part}
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for part in tensors.values() for x in part.values()
    )
    full = load_file(model / "model.safetensors")
    for part in tensors.values():
        assert all(torch.equal(value, full[name]) for name, value in part.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"a": 1}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "x"
    assert (tmp_path / "out" / "folder" / "template.jinja").read_text() == "y"


def test_files_that_a_user_added_to_an_export_are_kept_when_it_is_replaced(model, tmp_path):
    """Only files with names that an export writes are replaced or removed."""
    weights, out = HuggingFaceWeights(model), tmp_path / "out"
    write_huggingface(out, weights, {"a": 1}, WriteOptions(file_bytes=20_000))
    (out / "tokenizer.json").write_text("of the earlier export")
    (out / "adapter.safetensors").write_text("of the user")
    (out / "notes").mkdir()
    (out / "notes" / "config.json").write_text("notes of the user")
    write_huggingface(out, weights, {"a": 2}, WriteOptions(), replace=True)
    names = {"model.safetensors", "config.json", "adapter.safetensors", "notes"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "adapter.safetensors").read_text() == "of the user"
    assert (out / "notes" / "config.json").read_text() == "notes of the user"
    assert json.loads((out / "config.json").read_text()) == {"a": 2}


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_share_the_bytes(ranks, model):
    weights = HuggingFaceWeights(model)
    shares = [bytes_of_rank(weights, 20_000, Axis(None, rank, ranks)) for rank in range(ranks)]
    assert sum(shares) == size_of(weights) and min(shares) > 0


def test_files_hold_tensors_in_their_order_up_to_a_size(model):
    weights = HuggingFaceWeights(model)
    files = plan_files(weights, 20_000)
    assert len(files) > 2
    names = [name for file in files for name in sorted(file)]
    assert sorted(names) == sorted(weights.names())
    for file in files:
        size = sum(entry.nbytes for entry in file.values())
        assert size <= 20_000 or len(file) == 1
