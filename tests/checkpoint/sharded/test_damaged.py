"""A sharded model that is damaged, incomplete or another: nothing is made from it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from megalard.checkpoint.convert import export_model, import_model
from megalard.checkpoint.open import open_model
from megalard.checkpoint.sharded.manifest import MANIFEST, _digest
from megalard.checkpoint.sharded.save_load import checkpoint_axis
from megalard.errors import UserError
from megalard.parallel.mesh import SINGLE, build_mesh
from tests.checkpoint.test_faults import another_version, flip
from tests.models import make_model
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Two models of one shape, written by two ranks."""
    folder = tmp_path_factory.mktemp("damage")
    for name, seed in (("a", 0), ("b", 1)):
        make_model("llama", folder / name, seed=seed)
    run_ranks(2, _import_two, str(folder))
    return folder


def _import_two(folder: str) -> None:
    mesh = build_mesh("cpu", 2)
    axis = checkpoint_axis(mesh)
    for name in ("a", "b"):
        import_model(open_model(f"{folder}/{name}"), f"{folder}/sharded-{name}", mesh, axis)


@pytest.fixture
def copy(sharded, tmp_path):
    return shutil.copytree(sharded / "sharded-a", tmp_path / "copy")


def damage_of(directory: Path, out: Path) -> str:
    """The sentence an export of the checkpoint ends with; nothing is written."""
    with pytest.raises(UserError) as caught:
        export_model(open_model(directory), out, SINGLE)
    assert "\n" not in str(caught.value)
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return str(caught.value)


def test_every_flipped_byte_is_found(copy, tmp_path):
    chance = random.Random(7)
    files = sorted(copy.iterdir())
    for number in range(60):
        victim = files[number % len(files)]
        position = chance.randrange(victim.stat().st_size)
        flip(victim, position)
        sentence = damage_of(copy, tmp_path / "out")
        assert victim.name in sentence or victim.name == MANIFEST, (victim.name, position, sentence)
        flip(victim, position)
    export_model(open_model(copy), tmp_path / "out", SINGLE)


def test_a_missing_and_a_truncated_shard_are_named(copy, tmp_path):
    shard = copy / "weights-00001-000.safetensors"
    content = shard.read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        shard.write_bytes(content[:length])
        assert f"{shard} has {length} bytes" in damage_of(copy, tmp_path / "out")
    shard.unlink()
    assert f"{copy} lacks {shard.name}" in damage_of(copy, tmp_path / "out")


def test_a_shard_of_another_model_is_told(copy, sharded, tmp_path):
    shard = copy / "weights-00001-000.safetensors"
    other = sharded / "sharded-b" / shard.name
    assert other.stat().st_size == shard.stat().st_size
    shutil.copy(other, shard)
    sentence = damage_of(copy, tmp_path / "out")
    assert f"{shard} belongs to another checkpoint" in sentence or f"{shard} is damaged" in sentence


def test_a_manifest_of_another_version_is_told(copy, tmp_path):
    expected = another_version(copy)
    assert expected in damage_of(copy, tmp_path / "out")


def test_a_manifest_that_leads_out_of_its_directory_is_refused(copy, tmp_path):
    body = json.loads((copy / MANIFEST).read_text())
    body["files"]["../secret"] = {"size": 1, "sha256": "0"}
    body.pop("checksum")
    (copy / MANIFEST).write_text(json.dumps({**body, "checksum": _digest(body)}))
    assert "outside its directory" in damage_of(copy, tmp_path / "out")


@pytest.mark.parametrize("content", ["", "{ cut", "[]", '{"format": "another"}'])
def test_a_manifest_that_is_none_is_told(content, copy, tmp_path):
    (copy / MANIFEST).write_text(content)
    assert str(copy / MANIFEST) in damage_of(copy, tmp_path / "out")
