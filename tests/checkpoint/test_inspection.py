"""Descriptions of checkpoints, models and adapters in words and numbers."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.checkpoint.inspection import (
    describe_adapter,
    describe_checkpoint,
    describe_model,
    provenance_problem,
    readable,
)
from megalard.checkpoint.sharded.manifest import read_manifest
from megalard.training.run_folder import checkpoint_path
from tests.command_line import user_error
from tests.conversions import make_adapter, to_sharded
from tests.jobs import arguments, flip_bit, make_job, train


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job whose run has saved a checkpoint, and its model in the sharded format."""
    folder = make_job(tmp_path_factory.mktemp("inspection"))
    options = ("optimizer.steps=4", "checkpoint.save_every=2")
    train(arguments(folder, folder / "run", *options))
    to_sharded(folder / "model", folder / "sharded")
    return folder


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (25_300, "25.3 kB"),
        (13_476_000_000, "13.5 GB"),
        (2 * 10**12, "2.0 TB"),
    ],
)
def test_bytes_are_printed_in_the_largest_unit(count, text):
    assert readable(count) == text


def test_a_model_is_described(job):
    facts = describe_checkpoint(read_manifest(job / "sharded"))
    tensors = load_file(job / "model" / "model.safetensors")
    size = sum(x.nbytes for x in tensors.values())
    assert facts["kind"] == "a whole model" and facts["model"] == "llama, 2 layers of 32"
    assert facts["tensors"] == f"{len(tensors)} weights ({readable(size)})"
    assert facts["trained"] == "nothing" and facts["step"] == facts["base"] == "none"
    assert facts["complete"] == "yes" and "teacher" not in facts
    assert facts["written by"].startswith("1 ranks (dp 1 x cp 1 x tp 1) on cpu, megalard ")
    assert f"torch {metadata.version('torch')}" in facts["written by"]


def test_a_run_s_checkpoint_is_described(job):
    facts = describe_checkpoint(read_manifest(checkpoint_path(job / "run" / "checkpoints", 2)))
    assert facts["kind"] == "a run's state"
    assert facts["step"] == "2 of 4, seed 0, 8 blocks read"
    assert facts["trained"] == "lora rank 4, alpha 8 on q, k, v: 1,280 parameters in 12 tensors"
    assert facts["base"] == str(job / "model") and facts["teacher"] == "the base"
    # exp_avg, exp_avg_sq and step of 12 tensors, and one generator.
    assert "12 weights (5.1 kB), 36 optimizer (10.3 kB), 1 rng" in facts["tensors"]


def test_a_checkpoint_of_several_streams_and_another_teacher_is_described(job):
    manifest = read_manifest(checkpoint_path(job / "run" / "checkpoints", 2))
    (data,) = manifest.training["data"].values()
    streams = {"a": {**data, "blocks_read": 5}, "b": {**data, "blocks_read": 7}}
    training = {**manifest.training, "data": streams}
    body = {**manifest.body, "training": training, "teacher": {**manifest.base, "path": "/t"}}
    facts = describe_checkpoint(replace(manifest, body=body))
    assert facts["step"] == "2 of 4, seed 0, 12 blocks read"
    assert (facts["base"], facts["teacher"]) == (str(job / "model"), "/t")


def test_a_hugging_face_directory_is_described(job, tmp_path):
    facts = describe_model(job / "model")
    assert facts["kind"] == "a Hugging Face model" and facts["model"] == "llama, 2 layers of 32"
    assert facts["files"] == 1 and facts["checksums"] == "none are recorded"
    assert facts["bytes"] == (job / "model" / "model.safetensors").stat().st_size
    assert "not in model" not in facts
    tensors = load_file(job / "model" / "model.safetensors") | {"extra": torch.ones(2)}
    (tmp_path / "config.json").write_bytes((job / "model" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    assert describe_model(tmp_path)["not in model"] == "1 tensors, such as extra"
    assert "has no config.json" in user_error(describe_model, tmp_path / "..")


def test_an_adapter_is_described(job, tmp_path):
    facts = describe_adapter(make_adapter(tmp_path / "adapter", job / "model"))
    assert facts["kind"] == "a PEFT adapter" and facts["base"] == str(job / "model")
    assert facts["trained"] == "lora rank 2, alpha 4 on q_proj: 128 parameters"
    bare = make_adapter(tmp_path / "bare", job / "model", {"base_model_name_or_path": None})
    assert describe_adapter(bare)["base"] == "none is named"


def test_the_problem_of_a_base_is_a_sentence(job, tmp_path):
    manifest = read_manifest(checkpoint_path(job / "run" / "checkpoints", 2))
    base = tmp_path / "base"
    base.mkdir()
    for name in manifest.base["files"]:
        (base / name).write_bytes((job / "model" / name).read_bytes())
    assert provenance_problem(manifest.base, base, True, "base model") is None
    flip_bit(base / "model.safetensors")
    assert provenance_problem(manifest.base, base, False, "base model") is None
    problem = provenance_problem(manifest.base, base, True, "base model")
    assert problem.startswith(f"{base / 'model.safetensors'} is damaged or belongs to another")
