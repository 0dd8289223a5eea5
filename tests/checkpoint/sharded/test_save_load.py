"""Any size in, any size out: HF -> sharded by a ranks -> read by b ranks -> HF, bit for bit."""

from __future__ import annotations

import ctypes
import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megalard.checkpoint.build import empty_decoder
from megalard.checkpoint.convert import export_model, import_model, weight_layouts
from megalard.checkpoint.open import open_model
from megalard.checkpoint.sharded.manifest import read_manifest
from megalard.checkpoint.sharded.save_load import (
    ShardedWeights,
    as_dtensor,
    checkpoint_axis,
    load_sharded,
)
from megalard.files.safetensors import Entry, write_tensor_file
from megalard.model.rope import rope_table
from megalard.model.spec import read_spec
from megalard.parallel.mesh import SINGLE, Axis, build_mesh
from megalard.training.monitor import peak_memory_bytes
from tests.models import FAMILIES, make_model
from tests.ranks import run_ranks

SIZES = (1, 2, 4, 8)
_M_MMAP_THRESHOLD = -3
SHAPES = {
    "llama": {"num_key_value_heads": 2, "vocab_size": 32001},
    "llama-mha": {"num_key_value_heads": 8},
    "llama-tied": {"vocab_size": 32001},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 4, "vocab_size": 32001},
}
DTYPES = {"llama": torch.bfloat16, "mistral": torch.float16, "qwen2": torch.bfloat16}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Every family with 8 heads, few K/V heads, a vocabulary that 2 does not divide."""
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
        run_ranks(size, _import_all, str(folder), size)
    return folder


def _split(path, tensors) -> None:
    """Two files and an index."""
    (path / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        where |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def _import_all(folder: str, size: int) -> None:
    mesh = build_mesh("cpu", size)
    axis = checkpoint_axis(mesh)
    for family in FAMILIES:
        target = f"{folder}/sharded-{family}-{size}"
        import_model(open_model(f"{folder}/{family}"), target, mesh, axis)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
    same = found.contiguous().view(torch.uint8) == expected.contiguous().view(torch.uint8)
    assert bool(same.all()), what


@pytest.mark.parametrize("written", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_export_gives_back_every_bit(family, written, models, tmp_path):
    expected = tensors_of(models / family)
    export_model(
        open_model(models / f"sharded-{family}-{written}"), tmp_path / "out", SINGLE, 50000
    )
    found = tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(found[name], value, name)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("read", SIZES)
@pytest.mark.parametrize("written", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_of_any_size_reads_its_slices(family, written, read, models):
    expected = tensors_of(models / family)
    model = open_model(models / f"sharded-{family}-{written}")
    for rank in range(read):
        layouts = weight_layouts(model.weights, model.spec, Axis(None, rank, read))
        assert layouts.keys() == expected.keys()
        for name, layout in layouts.items():
            whole = expected[name]
            part = whole
            if layout.dim is not None:
                part = whole.narrow(layout.dim, layout.start, layout.length)
            assert_same_bits(model.weights.read(name, layout), part, f"{name} of rank {rank}")


@pytest.mark.parametrize("ranks", SIZES)
def test_torch_loads_at_another_size(ranks, models):
    run_ranks(ranks, _load_all, str(models), ranks)


def _load_all(folder: str, size: int) -> None:
    """Through DTensors, into which ``torch.distributed.checkpoint`` reads."""
    mesh = build_mesh("cpu", size)
    axis = checkpoint_axis(mesh)
    for family in ("llama", "qwen2", "qwen3"):
        source = open_model(f"{folder}/{family}")
        layouts = weight_layouts(source.weights, source.spec, mesh.tp)
        for written in SIZES:
            locals_ = {
                name: torch.zeros(layout.local_shape, dtype=source.weights.dtype(name))
                for name, layout in layouts.items()
            }
            tensors = {n: as_dtensor(local, layouts[n], mesh) for n, local in locals_.items()}
            load_sharded(ShardedWeights(f"{folder}/sharded-{family}-{written}"), tensors, axis)
            for name, local in locals_.items():
                assert_same_bits(local, source.weights.read(name, layouts[name]), name)


def test_the_manifest_describes_the_checkpoint(models):
    manifest = read_manifest(models / "sharded-llama-4")
    assert manifest.kind == "model" and manifest.config["model_type"] == "llama"
    writer = manifest.body["written_by"]
    assert (writer["ranks"], writer["tp"], writer["dp"]) == (4, 4, 1)
    assert writer["libraries"]["torch"] == torch.__version__
    # K/V heads fewer than ranks: two slices, each written once
    chunks = manifest.tensors["model.layers.0.self_attn.k_proj.weight"]["chunks"]
    assert sorted(chunk["offsets"] for chunk in chunks) == [[0, 0], [4, 0]]
    embedding = manifest.tensors["model.embed_tokens.weight"]
    assert embedding["shape"][0] == 32001 and embedding["dtype"] == "BF16"
    assert sorted(c["shape"][0] for c in embedding["chunks"]) == [7998, 8001, 8001, 8001]
    names = {path.name for path in (models / "sharded-llama-4").iterdir()}
    assert names == {*manifest.files, "manifest.json"}
    assert not any(name.endswith((".metadata", ".pt", ".bin", ".distcp")) for name in names)


def test_torchs_own_hugging_face_reader_reads_the_shards(models):
    """The format is no secret: slices are where torch's own storage looks for them."""
    expected = tensors_of(models / "qwen3")
    tensors = {name: torch.zeros_like(value) for name, value in expected.items()}
    folder = str(models / "sharded-qwen3-4")
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=True)
    for name, value in expected.items():
        assert_same_bits(tensors[name], value, name)


def test_the_documented_way_to_read_a_tensor_reads_it(models):
    page = (Path(__file__).parents[2] / "docs" / "checkpoint_format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(code, names)
    for name, value in tensors_of(models / "llama").items():
        assert_same_bits(names["read"](models / "sharded-llama-8", name), value, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_exported_config_as_the_original(family, models, tmp_path):
    export_model(open_model(models / f"sharded-{family}-2"), tmp_path / "out", SINGLE)
    ours, theirs = (
        AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "out", models / family)
    )
    assert ours["rope_parameters"] == theirs["rope_parameters"]
    head_dim = ours["hidden_size"] // ours["num_attention_heads"]
    del theirs["_name_or_path"]
    for key, value in theirs.items():
        expected = head_dim if key == "head_dim" and value is None else value
        assert ours.get(key, value) == expected, key


def test_a_sharded_checkpoint_is_written_again_from_a_sharded_checkpoint(models, tmp_path):
    mesh = build_mesh("cpu", 1)
    source = open_model(models / "sharded-qwen2-8")
    import_model(source, tmp_path / "again", mesh, SINGLE, file_bytes=20_000)
    assert len(list((tmp_path / "again").glob("weights-*.safetensors"))) > 2
    again = open_model(tmp_path / "again")
    for name, value in tensors_of(models / "qwen2").items():
        assert_same_bits(again.weights.read(name), value, name)


def test_memory_does_not_grow_with_the_model(tmp_path):
    """0.25 GB in tensors of at most 16 MB, of which two are held, there and back by one process."""
    run_ranks(1, _convert_within, str(tmp_path), 40 * 2**20)


def _convert_within(folder: str, allowed: int) -> None:
    # glibc would keep 20 to 60 MB of what was freed, by chance; what counts is what is held
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8000}
    config = FAMILIES["llama"][0](**shape, num_hidden_layers=7, tie_word_embeddings=True)
    source = Path(folder) / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    spec = read_spec(source)
    layouts = empty_decoder(spec, rope_table(spec), SINGLE).layouts
    entries = {name: Entry(torch.bfloat16, layout.full_shape) for name, layout in layouts.items()}
    zeros = (torch.zeros(entry.shape, dtype=entry.dtype) for entry in entries.values())
    size, _ = write_tensor_file(source / "model.safetensors", entries, zeros, {"format": "pt"})
    assert size > 250e6
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * os.sysconf("SC_PAGESIZE")
    import_model(open_model(source), f"{folder}/sharded", build_mesh("cpu", 1), SINGLE)
    export_model(open_model(f"{folder}/sharded"), f"{folder}/back", SINGLE)
    assert peak_memory_bytes(torch.device("cpu")) - before < allowed
