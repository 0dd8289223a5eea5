"""Bad input to the trainer is told in one sentence, and nothing is left of the attempt or lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.jobs import NATIVE, arguments, make_job, refusal, snapshot
from tests.models import make_model, scale_rope


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


def damage_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{ not it")


def remove_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def truncate_weights(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def duplicate_weights(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "again.safetensors")
    (model / "model.safetensors").rename(model / "weights.safetensors")


def cut_vocabulary(model: Path) -> None:
    make_model("llama", model, vocab_size=70, max_position_embeddings=NATIVE)


def cut_tensor(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


BAD_INPUT = {
    "missing model": (["model.teacher=/nowhere/model"], "no model directory at /nowhere/model"),
    "missing student": (["model.student=/nowhere/model"], "no model directory at /nowhere/model"),
    "missing tokenizer": (["model.tokenizer=/nowhere/t"], "model folder /nowhere/t does not exist"),
    "missing data": (
        ["data.paths=/nowhere/text.txt"],
        "data path /nowhere/text.txt does not exist",
    ),
    "missing config file": (["config"], "cannot read the config file"),
    "unknown key": (["optimizer.step=3"], "unknown key 'optimizer.step'; the nearest known one is"),
    "out of range": (["optimizer.min_ratio=2"], "optimizer.min_ratio must be in [0, 1]"),
    "tp without ranks": (["parallel.tp=3"], "tp"),
    "context beyond the window": (["data.context_length=65"], "longer than the teacher's native"),
    "dynamic RoPE": (["rope.type=dynamic"], "'dynamic' equals the teacher's RoPE"),
    "layer out of range": (["objective.layers=[3]"], "objective.layers names layer 3"),
    "batch not divisible": (["optimizer.micro_batch=3"], "a multiple of 3"),
    "batch beyond the data": (["optimizer.global_batch=400"], "global batch of 400"),
    "held-out text too short": (["evaluation.lengths=[9999]"], "asks for 9999"),
    "missing table": (["rope.type=table", "rope.table=/nowhere.npy"], "cannot read inverse freq"),
    "no GPU": (["run.device=cuda"], "run.device is cuda but torch sees no GPU"),
    "empty data": (["empty.txt", ""], "there is no document in"),
    "white space": (["empty.txt", " \n"], "there is no document in"),
    "data not UTF-8": (["empty.txt", "\udcff"], "is not UTF-8"),
    "data of another kind": (["data.bin", "x"], "unsupported suffix '.bin'"),
    "damaged tokenizer": ([damage_tokenizer], "cannot be read as a tokenizer"),
    "no tokenizer": ([remove_tokenizer], "neither tokenizer.json nor tokenizer.model"),
    "truncated weights": ([truncate_weights], "is truncated or damaged"),
    "duplicate weights": ([duplicate_weights], "stands in both"),
    "tokens beyond the vocabulary": ([cut_vocabulary], "the model has only 70 rows"),
    "weights of another shape": ([cut_tensor], "the files do not belong together"),
    "teacher already scaled": ([scale_rope], "is already scaled"),
}


@pytest.mark.parametrize("preflight", [[], ["--preflight"]], ids=["train", "preflight"])
@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_told_in_one_sentence(kind, preflight, job, tmp_path, capsys):
    """And the output directory may be used again: nothing of the attempt is left in it."""
    if kind == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (first, *rest), sentence = BAD_INPUT[kind]
    options = [f"evaluation.paths={job / 'heldout.txt'}"]
    command = []
    if callable(first):
        model = shutil.copytree(job / "model", tmp_path / "model")
        first(model)
        options.append(f"model.teacher={model}")
    elif first == "config":
        command = ["--config", str(tmp_path / "none.yaml")]
    elif "=" not in first:
        (tmp_path / first).write_text(rest[0], errors="surrogateescape")
        options.append(f"data.paths={tmp_path / first}")
    else:
        options += [first, *rest]
    output = tmp_path / "output"
    output.mkdir()
    line = refusal(capsys, [*preflight, *command, *arguments(job, output, *options)])
    assert sentence in line
    assert list(output.iterdir()) == []


def test_damaged_weights_are_told_before_the_text_is_tokenized(job, tmp_path, capsys):
    model = shutil.copytree(job / "model", tmp_path / "model")
    truncate_weights(model)
    options = [f"model.teacher={model}", f"data.cache={tmp_path / 'cache'}"]
    refusal(capsys, arguments(job, tmp_path / "output", *options))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("preflight", [[], ["--preflight"]], ids=["train", "preflight"])
def test_an_output_directory_that_is_not_empty_is_left_alone(preflight, job, tmp_path, capsys):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("precious")
    line = refusal(capsys, [*preflight, *arguments(job, tmp_path)])
    assert f"run.output {tmp_path} is not empty" in line
    assert snapshot(tmp_path) == {"student/config.json": b"precious"}
    file = tmp_path / "student" / "config.json"
    line = refusal(capsys, [*preflight, *arguments(job, file)])
    assert line.endswith(f"run.output {file} is a file: choose a directory")
    assert file.read_text() == "precious"


def test_an_output_directory_that_cannot_be_made_is_named(job, tmp_path, capsys):
    (tmp_path / "file").touch()
    line = refusal(capsys, arguments(job, tmp_path / "file" / "output"))
    assert f"cannot write to run.output {tmp_path / 'file' / 'output'}" in line
