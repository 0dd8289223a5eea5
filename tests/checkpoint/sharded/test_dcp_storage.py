"""The storage of ``torch.distributed.checkpoint``: shards that torch's own reader reads."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from megalard.checkpoint.sharded.dcp_storage import (
    OFFSETS_KEY,
    SHARDING_KEY,
    LazySavePlanner,
    ShardReader,
    ShardWriter,
)
from megalard.checkpoint.sharded.manifest import ID_KEY, read_manifest
from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.checkpoint.sharded.save_load import (
    as_dtensor,
    checkpoint_axis,
    save_sharded,
)
from megalard.checkpoint.write_options import WriteOptions
from megalard.model.parameter_slice import ParameterSlice, full_slice
from megalard.parallel.mesh import SINGLE, build_mesh
from tests.checkpoint.sharded.damage import digest
from tests.checkpoint.sharded.test_save_load import SECTIONS
from tests.ranks import run_ranks

FULL = torch.arange(40.0).view(10, 4)


def _save_on_four_ranks(directory: str) -> None:
    """Two slices, each held by two neighboring ranks, and a tensor that all ranks hold."""
    mesh = build_mesh("cpu", 4)
    half = mesh.tp.rank // 2
    held = ParameterSlice((10, 4), 0, 5 * half, 5, 2)
    tensors = {
        "split": as_dtensor(held.cut(FULL), held, mesh),
        "full": as_dtensor(torch.ones(3), full_slice((3,), 4), mesh),
    }
    save_sharded(directory, tensors, SECTIONS, checkpoint_axis(mesh), WriteOptions())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint that four ranks wrote."""
    path = tmp_path_factory.mktemp("dcp") / "checkpoint"
    run_ranks(4, _save_on_four_ranks, str(path))
    return path


def test_every_slice_is_written_once(checkpoint):
    tensors = read_manifest(checkpoint).tensors
    assert sorted(c["offsets"] for c in tensors["split"]["chunks"]) == [[0, 0], [5, 0]]
    assert [c["shape"] for c in tensors["full"]["chunks"]] == [[3]]
    weights = ShardedWeights(checkpoint)
    assert torch.equal(weights.read("split"), FULL) and torch.equal(
        weights.read("full"), torch.ones(3)
    )


def test_torch_s_own_hugging_face_reader_reads_the_shards(checkpoint):
    tensors = {"split": torch.zeros(10, 4), "full": torch.zeros(3)}
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    assert torch.equal(tensors["split"], FULL) and torch.equal(tensors["full"], torch.ones(3))


def test_a_shard_has_the_offsets_of_its_slices_and_the_id_of_its_checkpoint(checkpoint):
    manifest, offsets = read_manifest(checkpoint), {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            names = list(file.keys())
        # As docs/checkpoint_format.md defines it.
        assert metadata[ID_KEY] == manifest.body["id"] == digest(SECTIONS)[:32]
        sharding = json.loads(metadata[SHARDING_KEY])
        assert sorted(sharding) == sorted(names)
        for name, entry in sharding.items():
            offsets.setdefault(name, []).append(entry[OFFSETS_KEY])
    assert sorted(offsets["split"]) == [[0, 0], [5, 0]] and offsets["full"] == [[0]]


def test_torch_reads_any_slice_of_a_checkpoint(checkpoint):
    manifest = read_manifest(checkpoint)
    reader = ShardReader(manifest, ShardedWeights(checkpoint).read_chunk)
    tensors = {"split": torch.zeros(10, 4)}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    assert torch.equal(tensors["split"], FULL)


def test_slices_are_fetched_when_they_are_written(tmp_path):
    """So that one or two tensors are in memory, however large the model is."""
    events = []

    def read(name, start, size):
        events.append((name, start, size))
        return torch.full(size, float(len(events)))

    tensors = {name: torch.empty(2, 3, device="meta") for name in ("a", "b")}
    planner = LazySavePlanner(read)
    save_sharded(tmp_path / "x", tensors, SECTIONS, SINGLE, WriteOptions(), planner)
    assert events == [("a", (0, 0), (2, 3)), ("b", (0, 0), (2, 3))]
    assert torch.equal(ShardedWeights(tmp_path / "x").read("b"), torch.full((2, 3), 2.0))


def test_a_disk_that_ranks_do_not_share_is_named(tmp_path):
    """Rank 0 made the directory, and another rank does not see it."""
    writer = ShardWriter(tmp_path / "x", SECTIONS, WriteOptions())
    with pytest.raises(FileNotFoundError, match="rank 0 made this directory: choose a place on a"):
        writer.write_data(None, None)
