"""Bad input to the trainer is refused in one sentence, and the attempt leaves and loses nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.command_line import refusal
from tests.jobs import NATIVE, arguments, make_job
from tests.models import change_config, make_model, scale_rope


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job."""
    return make_job(tmp_path_factory.mktemp("bad-input"))


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


def widen_mlp(model: Path) -> None:
    change_config(model, intermediate_size=64)


def scale_student(model: Path) -> None:
    """Scale the model, next to a teacher that is not scaled."""
    shutil.copytree(model, model.with_name("teacher"))
    scale_rope(model)


def scale_by_yarn(model: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    change_config(model, rope_parameters={**rope, "rope_theta": 1e4})


# What is wrong: overrides, or the name and the content of a text, or a change of the model; and a
# part of the sentence.
BAD_INPUT = {
    "missing model": (["model.teacher=/nowhere/model"], "no model directory at /nowhere/model"),
    "missing student": (["model.student=/nowhere/model"], "no model directory at /nowhere/model"),
    "missing tokenizer": (
        ["model.tokenizer=/nowhere/t"],
        "model directory /nowhere/t does not exist",
    ),
    "missing data": (
        ["data.paths=/nowhere/text.txt"],
        "data path /nowhere/text.txt does not exist",
    ),
    "missing config file": (["config"], "cannot read the config file"),
    "unknown key": (["optimizer.step=3"], "unknown key 'optimizer.step'; the nearest known one is"),
    "out of range": (
        ["optimizer.min_ratio=2"],
        "optimizer.min_ratio must be at most 1; got 2.0",
    ),
    "tp without ranks": (["parallel.tp=3"], "parallel.tp 3 times parallel.cp 1 is 3 but 1 process"),
    "context beyond the window": (["data.context_length=65"], "longer than the teacher's native"),
    "dynamic RoPE": (["rope.type=dynamic"], "'dynamic' equals the teacher's RoPE"),
    "layer out of range": (["objective.layers=[3]"], "objective.layers names layer 3"),
    "batch not divisible": (["optimizer.micro_batch=3"], "a multiple of 3"),
    "batch beyond the data": (["optimizer.global_batch=400"], "global batch of 400"),
    "held-out text too short": (
        ["evaluation.lengths=[9999]"],
        "has 1415 tokens but the longest length is 9999",
    ),
    "missing table": (["rope.type=table", "rope.table=/nowhere.npy"], "cannot read inverse freq"),
    "no GPU": (["run.device=cuda"], "run.device is cuda but torch sees no GPU"),
    "empty data": (["empty.txt", ""], "there is no text in"),
    "white space": (["empty.txt", " \n"], "there is no text in"),
    "data not UTF-8": (["empty.txt", "\udcff"], "is not UTF-8"),
    "data of another kind": (["data.bin", "x"], "unsupported suffix '.bin'"),
    "damaged tokenizer": ([damage_tokenizer], "cannot be loaded by transformers"),
    "no tokenizer": ([remove_tokenizer], "neither tokenizer.json nor tokenizer.model"),
    "truncated weights": ([truncate_weights], "is truncated or damaged"),
    "duplicate weights": ([duplicate_weights], "is in both"),
    "tokens beyond the vocabulary": ([cut_vocabulary], "the model has only 70 rows"),
    "weights of another shape": ([widen_mlp], "the files do not belong together"),
    "teacher scaled by another type": ([scale_by_yarn], "is already scaled (rope_type 'yarn')"),
    "student scaled": ([scale_student], "the teacher's is not: keep it with rope.type"),
    "end token": (["data.eos=yes", "data.end_token=<end>"], "has no token '<end>'"),
}


@pytest.mark.parametrize("preflight", [[], ["--preflight"]], ids=["train", "preflight"])
@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_refused_in_one_sentence(kind, preflight, job, tmp_path, capsys):
    """The output directory may be used again: nothing of the attempt is in it."""
    if kind == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (start, *rest), sentence = BAD_INPUT[kind]
    options = [f"evaluation.paths={job / 'heldout.txt'}"]
    command = []
    if callable(start):
        model = shutil.copytree(job / "model", tmp_path / "model")
        start(model)
        teacher = model.with_name("teacher")
        options.append(f"model.teacher={teacher if teacher.exists() else model}")
        options.append(f"model.student={model}")
    elif start == "config":
        command = ["--config", str(tmp_path / "none.yaml")]
    elif "=" not in start:
        (tmp_path / start).write_text(rest[0], errors="surrogateescape")
        options.append(f"data.paths={tmp_path / start}")
    else:
        options += [start, *rest]
    output = tmp_path / "output"
    output.mkdir()
    line = refusal(capsys, "train", *preflight, *command, *arguments(job, output, *options))
    assert sentence in line
    assert list(output.iterdir()) == []


def test_damaged_weights_are_reported_before_the_text_is_tokenized(job, tmp_path, capsys):
    model = shutil.copytree(job / "model", tmp_path / "model")
    truncate_weights(model)
    options = [f"model.teacher={model}", f"data.cache={tmp_path / 'cache'}"]
    refusal(capsys, "train", *arguments(job, tmp_path / "output", *options))
    assert not (tmp_path / "cache").exists()
