"""An error on two ranks is reported once, by rank 0, and stops both."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

from megalard.train import main
from megalard.training.step import Distiller
from tests.jobs import arguments, make_job
from tests.models import make_model
from tests.ranks import run_ranks

TENSOR = "model.layers.1.self_attn.v_proj.lora_B"

# Overrides, and a part of the sentence.
CASES = {
    "missing data": (["data.paths=/nowhere/text.txt"], "/nowhere/text.txt does not exist"),
    "output not empty": (["run.output={job}"], "is not empty: choose another directory"),
    "tp without ranks": (["parallel.tp=4"], "processes were started"),
    "three heads": (
        ["model.teacher={job}/three-heads"],
        "parallel.tp 2 does not divide the model (3 heads, 3 K/V heads, intermediate size 48): "
        "use one of 1",
    ),
    "intermediate size not divisible": (
        ["model.teacher={job}/indivisible"],
        "parallel.tp 2 does not divide the model (4 heads, 2 K/V heads, intermediate size 45): "
        "use one of 1",
    ),
    "block not divisible": (
        ["parallel.tp=1", "parallel.cp=2", "data.context_length=30"],
        "a block of 30 tokens does not divide into 4 pieces (two for each of 2 cp ranks)",
    ),
    "evaluation not divisible": (
        ["parallel.tp=1", "parallel.cp=2", "evaluation.lengths=[9]"],
        "length 9 in evaluation.lengths is not a multiple of 4, into which cp 2 cuts it: use 8",
    ),
    "short text": (["optimizer.global_batch=400"], "one step reads a global batch of 400"),
    "not finite": ([], f"gradients are not finite on rank 1, in {TENSOR}"),
}


def _poison_rank_1() -> None:
    """Put a NaN into rank 1's slice of one gradient in the second step."""
    accumulate = Distiller.accumulate

    def poisoned(self, batches, number):
        result = accumulate(self, batches, number)
        if number == 1 and self.mesh.world.rank == 1:
            self.student.trained[TENSOR].grad.view(-1)[0] = float("nan")
        return result

    Distiller.accumulate = poisoned


def _run_every_case(folder: str) -> None:
    """Write each case's exit status and what this rank printed."""
    job, rank = Path(folder), os.environ["RANK"]
    # One process group serves all cases.
    torch.distributed.destroy_process_group = lambda: None
    _poison_rank_1()
    for name, (overrides, _) in CASES.items():
        options = [override.format(job=job) for override in overrides]
        held_out = f"evaluation.paths={job / 'heldout.txt'}"
        options = ["parallel.tp=2", held_out, *options]
        status = 0
        with open(job / f"{name}-{rank}.txt", "w") as file, contextlib.redirect_stderr(file):
            try:
                main(arguments(job, job / "outputs" / name, *options))
            except SystemExit as stopped:
                status = stopped.code
        (job / f"{name}-{rank}.status").write_text(str(status))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job, with what two ranks printed in every case."""
    job = make_job(tmp_path_factory.mktemp("job"))
    sizes = {"vocab_size": 257, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24}
    for name, changes in {"three-heads": heads, "indivisible": {"intermediate_size": 45}}.items():
        make_model("llama", job / name, **sizes, **changes)
    run_ranks(2, _run_every_case, str(job))
    return job


@pytest.mark.parametrize("name", CASES)
def test_an_error_is_reported_once_and_stops_both_ranks(name, job):
    printed = [(job / f"{name}-{rank}.txt").read_text() for rank in (0, 1)]
    lines = [line for line in printed[0].splitlines() if line.startswith("megalard: error: ")]
    assert len(lines) == 1 and CASES[name][1] in lines[0]
    assert "megalard: error" not in printed[1]
    assert [(job / f"{name}-{rank}.status").read_text() for rank in (0, 1)] == ["1", "1"]
    output = job / "outputs" / name
    if name == "not finite":
        assert not (output / "student").exists()
    else:
        assert not output.exists() or not list(output.iterdir())
