"""Nothing is made from a sharded model that is damaged, incomplete or mixed with another."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from megalard.checkpoint.sharded.manifest import ID_KEY, MANIFEST
from megalard.files.safetensors import TensorFile
from tests.checkpoint.sharded.damage import another_version, flip
from tests.command_line import user_error
from tests.conversions import shard_models, to_hugging_face, to_sharded
from tests.models import make_model
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Two models of one shape, written by two ranks."""
    folder = tmp_path_factory.mktemp("damage")
    for name, seed in (("a", 0), ("b", 1)):
        make_model("llama", folder / name, seed=seed)
    run_ranks(2, shard_models, str(folder), ("a", "b"), 2)
    return folder


@pytest.fixture
def copy(sharded, tmp_path):
    """A copy of the first model, which a test may damage."""
    return shutil.copytree(sharded / "sharded-a", tmp_path / "copy")


def refused_export(directory: Path, out: Path) -> str:
    """Return the sentence with which an export ends; nothing may be written."""
    sentence = user_error(to_hugging_face, directory, out)
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return sentence


def test_every_flipped_bit_is_found(copy, tmp_path):
    chance = random.Random(7)
    files = sorted(copy.iterdir())
    for number in range(60):
        victim = files[number % len(files)]
        position = chance.randrange(victim.stat().st_size)
        flip(victim, position)
        sentence = refused_export(copy, tmp_path / "out")
        assert victim.name in sentence or victim.name == MANIFEST, (victim.name, position, sentence)
        flip(victim, position)
    to_hugging_face(copy, tmp_path / "out")


def test_a_shard_of_another_length_and_a_missing_one_are_named(copy, tmp_path):
    shard = copy / "weights-00001-000.safetensors"
    content = shard.read_bytes()
    for length in (0, 7, 100, len(content) - 1, len(content) + 1):
        shard.write_bytes((content + b"x")[:length])
        sentence = refused_export(copy, tmp_path / "out")
        assert f"{shard} has {length} bytes, its manifest says {len(content)}" in sentence
    shard.unlink()
    assert f"{copy} lacks {shard.name}" in refused_export(copy, tmp_path / "out")


def test_a_file_that_cannot_be_read_is_named(copy, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(TensorFile, "read", fail)
    sentence = refused_export(copy, tmp_path / "out")
    assert f"cannot read {copy}/weights-0000" in sentence and "Input/output error" in sentence


def test_a_shard_of_another_model_is_refused(copy, sharded, tmp_path):
    shard = copy / "weights-00001-000.safetensors"
    other = sharded / "sharded-b" / shard.name
    assert other.stat().st_size == shard.stat().st_size
    shutil.copy(other, shard)
    sentence = refused_export(copy, tmp_path / "out")
    assert f"{shard} belongs to another checkpoint" in sentence or f"{shard} is damaged" in sentence


def test_a_shard_that_does_not_name_its_checkpoint_is_refused(copy, tmp_path):
    """Such as one that another program wrote, with the same tensors and the same length."""
    shard = copy / "weights-00001-000.safetensors"
    key = ID_KEY.encode()
    assert shard.read_bytes().count(key) == 1
    shard.write_bytes(shard.read_bytes().replace(key, b"x" * len(key)))
    assert f"{shard} belongs to another checkpoint" in refused_export(copy, tmp_path / "out")


def test_a_manifest_of_another_version_is_refused(copy, tmp_path):
    expected = another_version(copy)
    sentence = refused_export(copy, tmp_path / "out")
    assert expected in sentence and sentence.endswith("use the megalard that wrote it")


def test_shards_without_a_manifest_are_no_hugging_face_model(sharded, tmp_path):
    """One rank's shards hold whole tensors, whose checksums nobody would compare."""
    to_sharded(sharded / "a", tmp_path / "whole")
    (tmp_path / "whole" / MANIFEST).unlink()
    sentence = refused_export(tmp_path / "whole", tmp_path / "out")
    assert "is part of a sharded checkpoint" in sentence and f"has no {MANIFEST}" in sentence
