"""Any size in, any size out: Hugging Face -> sharded by a ranks -> read by b ranks, bit for bit."""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.checkpoint.companions import Companion
from megalard.checkpoint.convert import weight_slices
from megalard.checkpoint.open import open_model
from megalard.checkpoint.sharded.manifest import read_manifest
from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.checkpoint.sharded.save_load import (
    as_dtensor,
    checkpoint_axis,
    load_sharded,
    save_sharded,
)
from megalard.checkpoint.write_options import WriteOptions
from megalard.model.parameter_slice import ParameterSlice
from megalard.parallel.mesh import SINGLE, Axis, build_mesh
from tests.command_line import user_error
from tests.conversions import to_hugging_face, to_sharded, unfused
from tests.models import FAMILIES, make_model
from tests.ranks import run_ranks

SIZES = (1, 2, 4, 8)
SHAPES = {
    "llama": {"num_key_value_heads": 2, "vocab_size": 32001},
    "llama-mha": {"num_key_value_heads": 8},
    "llama-tied": {"vocab_size": 32001},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 4, "vocab_size": 32001},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "phi3-longrope": {"hidden_size": 64},
}
DTYPES = {"llama": torch.bfloat16, "mistral": torch.float16, "qwen2": torch.bfloat16}
# Eight ranks write families whose slices differ: one, two, four or eight K/V heads, fused matrices,
# and windows. Four ranks write two, with whole heads and with replicas.
BY_EIGHT = ("llama", "llama-mha", "qwen2", "qwen3", "ministral", "phi3-longrope")
BY_FOUR = ("llama", "qwen3")
WRITTEN = [
    (family, size)
    for family in FAMILIES
    for size in SIZES
    if family in {8: BY_EIGHT, 4: BY_FOUR}.get(size, FAMILIES)
]
SECTIONS = {
    "kind": "model",
    "config": {},
    "base": None,
    "trained": None,
    "training": None,
    "written_by": {},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Every family with 8 heads, few K/V heads, and a vocabulary that 2 does not divide."""
    folder = tmp_path_factory.mktemp("sharded")
    for family in FAMILIES:
        shape = {"num_attention_heads": 8, "vocab_size": 1003, "num_hidden_layers": 2}
        path = make_model(family, folder / family, **{**shape, **SHAPES.get(family, {})})
        if family in DTYPES:
            file = path / "model.safetensors"
            tensors = {k: v.to(DTYPES[family]) for k, v in load_file(file).items()}
            if family == "mistral":
                _split(path, tensors)
            else:
                save_file(tensors, file, {"format": "pt"})
    for size in SIZES:
        run_ranks(size, _shard_all, str(folder), size)
    return folder


def _split(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write two files and an index."""
    (path / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _shard_all(folder: str, size: int) -> None:
    mesh = build_mesh("cpu", size)
    axis = checkpoint_axis(mesh)
    for family, written in WRITTEN:
        if written != size:
            continue
        to_sharded(f"{folder}/{family}", f"{folder}/sharded-{family}-{size}", mesh, axis)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a Hugging Face directory."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
    same = actual.contiguous().view(torch.uint8) == expected.contiguous().view(torch.uint8)
    assert bool(same.all()), name


@pytest.mark.parametrize(("family", "written"), WRITTEN)
def test_an_export_has_every_bit_of_the_original(family, written, models, tmp_path):
    expected = tensors_of(models / family)
    source = models / f"sharded-{family}-{written}"
    to_hugging_face(source, tmp_path / "out", file_bytes=50_000)
    exported = tensors_of(tmp_path / "out")
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(exported[name], value, name)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("read", SIZES)
@pytest.mark.parametrize(("family", "written"), WRITTEN)
def test_every_rank_of_any_size_reads_its_slices(family, written, read, models):
    model = open_model(models / f"sharded-{family}-{written}")
    expected = unfused(tensors_of(models / family), model.spec)
    for rank in range(read):
        slices = weight_slices(model.weights, model.spec, Axis(None, rank, read))
        assert slices.keys() == expected.keys()
        for name, held in slices.items():
            part = expected[name]
            if held.dim is not None:
                part = part.narrow(held.dim, held.start, held.length)
            assert_same_bits(model.weights.read(name, held), part, f"{name} of rank {rank}")


@pytest.mark.parametrize("ranks", SIZES)
def test_torch_loads_at_another_size(ranks, models):
    run_ranks(ranks, _load_all, str(models), ranks)


def _load_all(folder: str, size: int) -> None:
    """Through DTensors, into which ``torch.distributed.checkpoint`` reads."""
    mesh = build_mesh("cpu", size)
    axis = checkpoint_axis(mesh)
    for family in ("llama", "qwen2", "qwen3"):
        source = open_model(f"{folder}/{family}")
        slices = weight_slices(source.weights, source.spec, mesh.tp)
        for written in (size for name, size in WRITTEN if name == family):
            parts = {
                name: torch.zeros(held.local_shape, dtype=source.weights.dtype(name))
                for name, held in slices.items()
            }
            tensors = {n: as_dtensor(local, slices[n], mesh) for n, local in parts.items()}
            load_sharded(ShardedWeights(f"{folder}/sharded-{family}-{written}"), tensors, axis)
            for name, local in parts.items():
                assert_same_bits(local, source.weights.read(name, slices[name]), name)


def test_the_manifest_describes_the_checkpoint(models):
    manifest = read_manifest(models / "sharded-llama-4")
    assert manifest.kind == "model" and manifest.config["model_type"] == "llama"
    writer = manifest.body["written_by"]
    assert (writer["ranks"], writer["tp"], writer["dp"]) == (4, 4, 1)
    assert writer["libraries"]["torch"] == metadata.version("torch")
    # There are fewer K/V heads than ranks: two slices, each of which is written once.
    chunks = manifest.tensors["model.layers.0.self_attn.k_proj.weight"]["chunks"]
    assert sorted(chunk["offsets"] for chunk in chunks) == [[0, 0], [4, 0]]
    embedding = manifest.tensors["model.embed_tokens.weight"]
    assert embedding["shape"][0] == 32001 and embedding["dtype"] == "BF16"
    assert sorted(c["shape"][0] for c in embedding["chunks"]) == [7998, 8001, 8001, 8001]
    names = {path.name for path in (models / "sharded-llama-4").iterdir()}
    assert names == {*manifest.files, "manifest.json"}
    assert not any(name.endswith((".metadata", ".pt", ".bin", ".distcp")) for name in names)


def test_the_documented_way_to_read_a_tensor_reads_it(models):
    page = (Path(__file__).parents[3] / "docs" / "checkpoint_format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(code, names)
    for name, value in tensors_of(models / "llama").items():
        assert_same_bits(names["read"](models / "sharded-llama-8", name), value, name)


def test_a_sharded_checkpoint_is_written_from_a_sharded_checkpoint(models, tmp_path):
    to_sharded(models / "sharded-qwen2-8", tmp_path / "again", file_bytes=20_000)
    assert len(list((tmp_path / "again").glob("weights-*.safetensors"))) > 2
    again = open_model(tmp_path / "again")
    for name, value in tensors_of(models / "qwen2").items():
        assert_same_bits(again.weights.read(name), value, name)


def save(directory: Path, tensors: dict[str, torch.Tensor], **options) -> None:
    """Write a small checkpoint in one process."""
    save_sharded(directory, tensors, SECTIONS, SINGLE, WriteOptions(**options))


def test_boxes_are_assembled_from_the_slices_they_overlap(tmp_path):
    full = torch.arange(48.0).view(12, 4)
    run_ranks(3, _save_rows, str(tmp_path / "x"))
    weights = ShardedWeights(tmp_path / "x")
    for start, size in (((0, 0), (12, 4)), ((3, 1), (5, 2)), ((4, 0), (4, 4)), ((11, 3), (1, 1))):
        box = weights.read_box("x", start, size)
        assert torch.equal(box, full[start[0] : start[0] + size[0], start[1] : start[1] + size[1]])
    assert weights.read_box("x", (2, 0), (0, 4)).shape == (0, 4)


def _save_rows(directory: str) -> None:
    mesh = build_mesh("cpu", 3)
    local = torch.arange(48.0).view(12, 4)[4 * mesh.tp.rank :][:4]
    held = ParameterSlice((12, 4), 0, 4 * mesh.tp.rank, 4, 1)
    tensors = {"x": as_dtensor(local, held, mesh)}
    save_sharded(directory, tensors, SECTIONS, checkpoint_axis(mesh), WriteOptions())


def test_every_file_and_the_directory_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """The manifest is the last file, and the directory gets its name after it."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noting_fsync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noting_rename(self, target):
        events.append(f"rename {self.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    (tmp_path / "tokenizer.json").write_text("x")
    tensors = {name: torch.ones(3) for name in ("a", "b", "optimizer.exp_avg.a")}
    companions = (Companion("tokenizer.json", tmp_path / "tokenizer.json"),)
    save(tmp_path / "x", tensors, companions=companions, file_bytes=12)
    shards = {
        "weights-00000-000.safetensors",
        "weights-00000-001.safetensors",
        "optimizer-00000-000.safetensors",
    }
    renamed = events.index("rename x.partial")
    assert {*shards, "config.json", "tokenizer.json"} <= set(events[:renamed])
    assert events[renamed - 2 : renamed] == ["manifest.json", "x.partial"]
    # The mark of an unfinished directory is removed between the two names.
    names = [re.sub(r"-[0-9a-f]+$", "", event) for event in events[renamed + 1 :]]
    assert names == ["rename x.done", tmp_path.name], "the name itself is synced"
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        *shards,
        "config.json",
        "tokenizer.json",
        "manifest.json",
    }


def test_an_error_before_the_commit_leaves_nothing(tmp_path):
    def refuse() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "x", {"a": torch.ones(3)}, before_commit=refuse)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_not_replaced(tmp_path):
    save(tmp_path / "x", {"a": torch.ones(3)})
    sentence = user_error(save, tmp_path / "x", {"a": torch.zeros(3)})
    assert sentence.startswith(f"cannot write checkpoint {tmp_path / 'x'}: Directory not empty")
    assert sentence.endswith("what was saved before is untouched")
    assert torch.equal(ShardedWeights(tmp_path / "x").read("a"), torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_tensor_of_another_model_is_refused(tmp_path):
    save(tmp_path / "x", {"a": torch.ones(3)})
    weights = ShardedWeights(tmp_path / "x")
    assert user_error(load_sharded, weights, {"a": torch.zeros(4)}, SINGLE) == (
        f"tensor a in {tmp_path / 'x'} has shape [3], but the model needs [4]: it is a checkpoint "
        "of another model"
    )
    assert "has no tensor b" in user_error(load_sharded, weights, {"b": torch.zeros(3)}, SINGLE)
    loaded = {"a": torch.zeros(3)}
    load_sharded(weights, loaded, SINGLE)
    assert torch.equal(loaded["a"], torch.ones(3))


def test_the_optimizer_is_not_among_the_weights_of_a_run(tmp_path):
    tensors = {
        "a": torch.ones(3),
        "optimizer.step.a": torch.ones(1),
        "rng.cpu.00000": torch.ones(2),
    }
    save(tmp_path / "model", tensors)
    assert sorted(ShardedWeights(tmp_path / "model").names()) == sorted(tensors)
    note = {"path": "/base", "files": {}}
    run = {**SECTIONS, "kind": "training", "base": note, "trained": {}, "training": {}}
    save_sharded(tmp_path / "run", tensors, run, SINGLE, WriteOptions())
    assert ShardedWeights(tmp_path / "run").names() == ["a"]


def _check_distributed_tensor() -> None:
    mesh = build_mesh("cpu", 2)
    full = torch.arange(24.0).view(2, 4, 3)
    held = ParameterSlice((2, 4, 3), 1, 2 * mesh.tp.rank, 2, 1)
    tensor = as_dtensor(held.cut(full), held, mesh)
    assert (tensor.shape, tensor.stride()) == (full.shape, full.stride())
    assert torch.equal(tensor.to_local(), held.cut(full))


def test_a_distributed_tensor_has_the_shape_and_strides_of_the_full_one():
    run_ranks(2, _check_distributed_tensor)
