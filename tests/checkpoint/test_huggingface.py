"""Reading a Hugging Face directory: only this rank's slices, and damage told in one sentence."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.checkpoint import huggingface
from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.errors import UserError
from megalard.parallel.mesh import Axis
from tests.logits import load
from tests.models import make_model

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama-biases", tmp_path_factory.mktemp("model") / "whole")


@pytest.fixture
def copy(model, tmp_path):
    """The model in a directory that a test may damage."""
    return shutil.copytree(model, tmp_path / "copy")


class SliceSpy:
    """Stands for safetensors' slice and notes what is read of it."""

    def __init__(self, part, name, log):
        self.part, self.name, self.log = part, name, log

    def get_shape(self):
        return self.part.get_shape()

    def __getitem__(self, index):
        value = self.part[index]
        self.log.append((self.name, value))
        return value


class FileSpy:
    """Stands for safetensors' open file; reading a whole tensor past its slices is an error."""

    def __init__(self, file, log):
        self.file, self.log = file, log

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return SliceSpy(self.file.get_slice(name), name, self.log)


@pytest.fixture
def reads(monkeypatch):
    """Every (name, tensor) read from files from now on."""
    log = []
    open_file = huggingface._open
    monkeypatch.setattr(huggingface, "_open", lambda path: FileSpy(open_file(path), log))
    return log


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_reads_only_its_slices(tp, model, reads):
    """No tensor is read twice or beyond its slice, and the ranks' slices make up the whole."""
    whole = load_file(model / "model.safetensors")
    parts = {name: [] for name in whole}
    for rank in range(tp):
        reads.clear()
        decoder = load(model, Axis(None, rank, tp))
        assert sorted(name for name, _ in reads) == sorted(whole)
        for name, value in reads:
            layout = decoder.layouts[name]
            assert tuple(value.shape) == layout.local_shape
            if layout.dim is None:
                assert torch.equal(value, whole[name])
                continue
            # an uneven vocabulary may cost one row more
            assert value.numel() <= math.ceil(whole[name].numel() * layout.replicas / tp) + 32
            stop = layout.start + layout.length
            index = torch.arange(layout.start, stop)
            assert torch.equal(value, whole[name].index_select(layout.dim, index))
            parts[name].append((layout, value))
    for name, found in parts.items():
        if found:
            joined = torch.cat([v for _, v in found[:: found[0][0].replicas]], found[0][0].dim)
            assert torch.equal(joined, whole[name])


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_weight_files(copy):
    (copy / "model.safetensors").unlink()
    assert refusal(HuggingFaceWeights, copy) == f"{copy} has no .safetensors files: check the path"


def test_pickled_weights_are_to_be_converted(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "convert its .bin files to safetensors" in refusal(HuggingFaceWeights, copy)


@pytest.mark.parametrize("length", [0, 5, 500, -100])
def test_a_truncated_file_is_named(length, copy):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:length])
    assert f"{path} is truncated or damaged" in refusal(HuggingFaceWeights, copy)


def test_a_tensor_in_two_files_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    save_file({Q: tensors[Q]}, copy / "another.safetensors")
    sentence = refusal(HuggingFaceWeights, copy)
    assert f"tensor {Q} stands in both another.safetensors and model-1.safetensors" in sentence


def test_other_files_beside_a_single_one_are_left_alone(copy):
    """As in transformers: Mistral's consolidated.safetensors, and what macOS leaves."""
    expected = HuggingFaceWeights(copy).names()
    save_file({"tok_embeddings.weight": torch.ones(2)}, copy / "consolidated.safetensors")
    assert HuggingFaceWeights(copy).names() == expected
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    (copy / "consolidated.safetensors").unlink()
    (copy / "._weights.safetensors").write_bytes(b"no header")
    assert HuggingFaceWeights(copy).names() == expected


def split(folder, *, index: dict | str | None = None) -> None:
    """Cut the model's file in two, with an index beside them."""
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
    sentence = refusal(HuggingFaceWeights, copy)
    assert sentence == f"{copy} lacks model-00002-of-00002.safetensors, named by its index"


@pytest.mark.parametrize(
    "index",
    ["{ cut", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}'],
)
def test_a_damaged_index_is_named(index, copy):
    split(copy, index=index)
    assert "is not a safetensors index" in refusal(HuggingFaceWeights, copy)


def test_files_beside_the_index_are_not_read(copy, model):
    split(copy)
    shutil.copy(model / "model.safetensors", copy / "consolidated.safetensors")
    whole = load_file(model / "model.safetensors")
    weights = HuggingFaceWeights(copy)
    assert sorted(weights.names()) == sorted(whole)
    assert all(torch.equal(weights.read(name), value) for name, value in whole.items())


def test_a_missing_tensor_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors[Q]
    save_file(tensors, copy / "model.safetensors")
    assert f"has no tensor {Q}, which its config.json implies" in refusal(load, copy)


def test_a_tensor_of_another_shape_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors[Q] = tensors[Q][:-8].contiguous()
    save_file(tensors, copy / "model.safetensors")
    sentence = refusal(load, copy)
    assert f"tensor {Q}" in sentence
    assert "has shape [24, 32], but config.json implies [32, 32]" in sentence
