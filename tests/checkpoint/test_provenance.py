"""The models that a checkpoint refers to: noted by path, size and checksum, and compared."""

from __future__ import annotations

import hashlib
import shutil

import pytest

from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.checkpoint.open import open_model
from megalard.checkpoint.provenance import check_checksums, check_files, describe_files, moved_to
from megalard.parallel.mesh import SINGLE, Axis, build_mesh
from tests.command_line import user_error
from tests.conversions import make_adapter
from tests.jobs import flip_bit
from tests.models import make_model
from tests.ranks import run_ranks


@pytest.fixture
def model(tmp_path):
    """A small model."""
    return make_model("llama", tmp_path / "model")


def test_a_note_has_the_size_and_the_checksum_of_every_file(model):
    note = describe_files(HuggingFaceWeights(model), SINGLE)
    assert note["path"] == str(model) and list(note["files"]) == [
        "config.json",
        "model.safetensors",
    ]
    for name, file in note["files"].items():
        content = (model / name).read_bytes()
        assert file == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_files_of_a_derived_model_are_those_of_its_base_too(model, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", model)
    note = describe_files(open_model(adapter).weights, SINGLE)
    assert set(note["files"]) == {
        "adapter_model.safetensors",
        "../model/model.safetensors",
    }
    check_files(note, adapter)


def _describe_on_ranks(folder: str) -> None:
    world = build_mesh("cpu", 1).world
    weights = HuggingFaceWeights(f"{folder}/model")
    assert describe_files(weights, world) == describe_files(weights, SINGLE)


def test_ranks_share_the_files_and_get_the_same_note(model):
    run_ranks(3, _describe_on_ranks, str(model.parent))


def test_a_moved_model_is_accepted_and_a_changed_one_is_not(model, tmp_path):
    note = describe_files(HuggingFaceWeights(model), SINGLE)
    moved = shutil.copytree(model, tmp_path / "moved")
    counts: list[int] = []
    check_files(note, moved, progress=counts.append)
    assert sum(counts) == sum(file["size"] for file in note["files"].values())
    assert moved_to(note, moved) == {**note, "path": str(moved)}
    flip_bit(moved / "model.safetensors")
    sentence = user_error(check_files, note, moved, role="teacher")
    assert sentence.startswith(f"{moved / 'model.safetensors'} is damaged or belongs to another")
    assert "the checkpoint's note of its teacher says" in sentence
    # Names and lengths alone do not show it.
    check_files(note, moved, with_checksums=False)


@pytest.mark.parametrize("change", ["missing", "longer"])
def test_a_missing_file_and_one_of_another_length_are_named(change, model):
    note = describe_files(HuggingFaceWeights(model), SINGLE)
    file = model / "model.safetensors"
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b"x")
    for with_checksums in (True, False):
        assert user_error(check_files, note, model, with_checksums=with_checksums) == (
            f"{file} is not the file the checkpoint was trained on: give the directory of its base "
            "model"
        )


def test_every_rank_looks_at_all_lengths_and_reads_its_share(model):
    note = describe_files(HuggingFaceWeights(model), SINGLE)
    flip_bit(model / "model.safetensors")  # the second of the two files
    check_files(note, model, Axis(None, 0, 2))
    assert "is damaged" in user_error(check_files, note, model, Axis(None, 1, 2))
    (model / "model.safetensors").unlink()
    for rank in range(2):
        assert "is not the file" in user_error(check_files, note, model, Axis(None, rank, 2))


def test_the_source_of_an_expected_checksum_is_named(tmp_path):
    (tmp_path / "x").write_bytes(b"content")
    check_checksums(tmp_path, [("x", {"sha256": hashlib.sha256(b"content").hexdigest()})])
    sentence = user_error(check_checksums, tmp_path, [("x", {"sha256": "0" * 64})], "a note")
    assert "a note says 000000000000…; restore the file" in sentence
