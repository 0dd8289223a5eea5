"""Profiles of chosen steps: the files of every rank, and that they change nothing else."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalard.parallel.mesh import build_mesh
from megalard.reporter import Reporter
from megalard.training.profiler import profiled
from tests.jobs import arguments, metrics, train
from tests.ranks import run_ranks


def _train(words: list[str]) -> None:
    train(words)


def names(output: Path) -> list[str]:
    folder = output / "profile"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def events(path: Path) -> set[str]:
    with gzip.open(path, "rt") as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def test_the_chosen_steps_are_profiled_and_nothing_changes(small_job, tmp_path, capsys):
    train(arguments(small_job, tmp_path / "run", "run.profile=[2, 8]"))
    assert names(tmp_path / "run") == [
        "step-000002-rank-00000.json.gz",
        "step-000008-rank-00000.json.gz",
    ]
    ranges = events(tmp_path / "run" / "profile" / "step-000002-rank-00000.json.gz")
    # The ranges of the trainer, each within the step.
    assert {"relations", "backward", "optimizer", "aten::mm"} <= ranges
    assert f"step 2 was profiled: {tmp_path / 'run' / 'profile'}" in capsys.readouterr().out
    train(arguments(small_job, tmp_path / "plain"))
    assert names(tmp_path / "plain") == []
    profiled_run, plain = (
        load_file(tmp_path / name / "student" / "model.safetensors") for name in ("run", "plain")
    )
    assert all(torch.equal(profiled_run[name], plain[name]) for name in plain)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "plain")]
    assert losses[0] == losses[1]


def test_every_rank_writes_its_profile(small_job, tmp_path):
    words = arguments(small_job, tmp_path / "run", "run.profile=[1]", "optimizer.steps=1")
    run_ranks(2, _train, [*words, "--parallel.tp=2"])
    assert names(tmp_path / "run") == [f"step-000001-rank-0000{rank}.json.gz" for rank in (0, 1)]


def test_a_profile_that_cannot_be_written_does_not_end_the_run(small_job, tmp_path, capsys):
    output = tmp_path / "run"
    with profiled(tmp_path, 3, build_mesh("cpu", 1), Reporter(True)):
        (tmp_path / "profile").write_text("a file")
    assert "warning: step 3 was profiled, but" in capsys.readouterr().out
    assert not output.exists()


def test_an_error_of_the_step_is_that_of_the_caller(tmp_path):
    mesh = build_mesh("cpu", 1)
    with pytest.raises(ZeroDivisionError), profiled(tmp_path, 1, mesh, Reporter(True)):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_writes_its_memory(tmp_path):
    mesh = build_mesh("cuda", 1)
    with profiled(tmp_path, 1, mesh, Reporter(True)):
        value = torch.ones(1 << 20, device=mesh.device) * 2
    folder = tmp_path / "profile"
    assert names(tmp_path) == [
        "step-000001-rank-00000.json.gz",
        "step-000001-rank-00000.memory.pickle",
    ]
    snapshot = pickle.loads((folder / "step-000001-rank-00000.memory.pickle").read_bytes())
    sizes = [event["size"] for trace in snapshot["device_traces"] for event in trace]
    assert value.numel() * 4 in sizes
