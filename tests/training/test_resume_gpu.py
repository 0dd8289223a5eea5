"""Saving and resuming on GPUs: asynchronous from pinned memory, on the same ranks and on fewer.

With ``run.deterministic`` a resumed run has the bits of the uninterrupted one. Without it PyTorch's
attention adds up its gradients in an order that changes from run to run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalard import cli
from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.training import saver
from megalard.training.run_folder import checkpoint_path
from tests.jobs import STEPS, arguments, interrupted, losses, make_job
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")

COMMON = (
    "run.device=cuda",
    "run.deterministic=true",
    "checkpoint.save_every=2",
    "checkpoint.keep_last=9",
)
BF16, TP2, CP2 = "model.compute_dtype=bfloat16", "parallel.tp=2", "parallel.cp=2"
# summation order alone differs between topologies: fp32 rounding through the steps that are left
TOLERANCE = 1e-4


def run(job: Path, output: Path, *options: str) -> None:
    assert cli.main(["train", *arguments(job, output, *COMMON, *options)]) == 0


def assert_same_bits(output: Path, whole: Path) -> None:
    assert losses(output) == losses(whole)
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (output, whole))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def assert_same_within_rounding(output: Path, whole: Path) -> None:
    assert losses(output) == pytest.approx(losses(whole), rel=TOLERANCE)
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (output, whole))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error = (ours[name].double() - value.double()).norm() / value.double().norm()
        assert error < TOLERANCE, f"{name} is off by {error:.1e}"


@pytest.fixture(scope="module", autouse=True)
def any_kernels_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def one(job):
    """Uninterrupted on one GPU, its checkpoints written before training went on."""
    run(job, job / "one", "checkpoint.asynchronous=false")
    return job / "one"


@pytest.fixture(scope="module")
def two(job):
    """Uninterrupted on two GPUs: ``tp2``, ``dp2`` and ``cp2``."""
    run_ranks(2, _run_all, str(job), [("tp2", (TP2,)), ("dp2", ()), ("cp2", (CP2,))])
    return job


def _run_all(folder: str, runs: list[tuple[str, tuple[str, ...]]]) -> None:
    """Several runs by ranks that are started once; the helper ends their process group."""
    end, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, _stay
    try:
        for name, options in runs:
            run(Path(folder), Path(folder) / name, *options)
    finally:
        torch.distributed.destroy_process_group = end


def _stay() -> None:
    pass


def test_what_is_written_from_pinned_memory_is_the_state_of_its_step(
    job, one, tmp_path, monkeypatch
):
    """Each write waits until a later step was reported; a synchronous run's has the same bits."""
    output, write, overtaken = tmp_path / "output", saver.save_sharded, []
    metrics_file = output / "metrics.jsonl"

    def late(directory, tensors, *args, **kwargs):
        assert all(tensor.is_pinned() for tensor in tensors.values())
        step = int(directory.name.removeprefix("step-"))
        while len(metrics_file.read_text().splitlines()) < min(step + 1, STEPS):
            pass
        overtaken.append(step)
        write(directory, tensors, *args, **kwargs)

    monkeypatch.setattr(saver, "save_sharded", late)
    run(job, output)
    assert overtaken == [2, 4, 6, 8]
    assert_same_bits(output, one)
    for step in overtaken:
        ours, theirs = (
            ShardedWeights(checkpoint_path(folder / "checkpoints", step))
            for folder in (output, one)
        )
        assert ours.manifest.tensors.keys() == theirs.manifest.tensors.keys()
        assert "rng.cuda.00000" in ours.manifest.tensors
        for name in ours.manifest.tensors:
            if not name.startswith("rng."):
                assert torch.equal(ours.read(name), theirs.read(name)), (step, name)


def test_one_gpu_goes_on_bit_for_bit(job, one, tmp_path):
    run(job, interrupted(one, tmp_path / "output"))
    assert_same_bits(tmp_path / "output", one)


def test_one_gpu_goes_on_bit_for_bit_in_bf16(job, tmp_path):
    run(job, tmp_path / "whole", BF16)
    run(job, interrupted(tmp_path / "whole", tmp_path / "output"), BF16)
    assert_same_bits(tmp_path / "output", tmp_path / "whole")


@two_gpus
def test_two_gpus_go_on_bit_for_bit_and_from_one(job, one, two):
    """One start of two ranks for all four."""
    interrupted(two / "tp2", job / "tp2-again")
    interrupted(two / "dp2", job / "dp2-again")
    interrupted(two / "cp2", job / "cp2-again")
    interrupted(one, job / "one-on-tp2")
    runs = [("tp2-again", (TP2,)), ("dp2-again", ()), ("cp2-again", (CP2,)), ("one-on-tp2", (TP2,))]
    run_ranks(2, _run_all, str(job), runs)
    assert_same_bits(job / "tp2-again", two / "tp2")
    assert_same_bits(job / "dp2-again", two / "dp2")
    assert_same_bits(job / "cp2-again", two / "cp2")
    assert_same_within_rounding(job / "one-on-tp2", one)


@two_gpus
@pytest.mark.parametrize("name", ["tp2", "dp2"])
def test_one_gpu_goes_on_from_two(name, job, two, tmp_path):
    run(job, interrupted(two / name, tmp_path / "output"))
    assert_same_within_rounding(tmp_path / "output", two / name)
