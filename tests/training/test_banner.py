"""What a run prints at its start and at its end."""

from __future__ import annotations

import os

import pytest
from transformers import AutoModelForCausalLM

from tests.jobs import arguments, make_job, train


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job."""
    return make_job(tmp_path_factory.mktemp("banner"))


def test_a_run_prints_what_it_is_about_to_do(job, tmp_path, capsys):
    train(arguments(job, tmp_path / "output", "optimizer.steps=2", "rope.type=yarn"))
    lines = capsys.readouterr().out.splitlines()
    model = AutoModelForCausalLM.from_pretrained(job / "model")
    shapes = [
        tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if any(f".{p}_proj." in name for p in "qkv")
    ]
    # A pair of rank 4 for q, k and v of two layers.
    trained = sum(4 * (rows + columns) for rows, columns in shapes)
    assert lines[:4] == [
        f"model     llama, 2 layers of 32: {job / 'model'}",
        "window    64 -> 256 tokens (RoPE yarn)",
        "ranks     1 on cpu: dp 1 x cp 1 x tp 1",
        lines[3],
    ]
    assert lines[3].startswith("kernels   ")
    assert lines[4:7] == [
        f"trained   {trained:,} parameters in 12 tensors (lora)",
        "text      2 steps of 128 tokens: 256 tokens",
        f"output    {tmp_path / 'output'}",
    ]
    assert lines[-2] == f"restored model: {tmp_path / 'output' / 'student'}"
    assert lines[-1].startswith("nothing was measured: give held-out text in evaluation.paths")


def test_every_stage_is_a_line(job, tmp_path, capsys):
    stages = (
        "stages={ard: {}, long: {objective: {language_modelling: 1}, data: {context_length: 64}}}"
    )
    train(arguments(job, tmp_path / "output", stages, "optimizer.steps=1"))
    lines = capsys.readouterr().out.splitlines()
    assert "ard       1 steps of 128 tokens: 128 tokens" in lines
    assert "long      1 steps of 256 tokens: 256 tokens" in lines
    assert "stage long: 1 steps of 256 tokens (lora)" in lines


def test_restarts_without_checkpoints_are_warned_about(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "TORCHELASTIC_MAX_RESTARTS", "3")
    train(arguments(job, tmp_path / "output", "optimizer.steps=1"))
    printed = capsys.readouterr()
    warning = "checkpoint.save_every is 0, so a restart begins where this start began"
    assert warning in printed.out + printed.err
