"""Divided weights over NCCL: the bits of whole weights, and the memory that was estimated."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalard.estimate.memory import stage_memory
from megalard.estimate.rank_layout import RankLayout
from megalard.parallel.mesh import build_mesh
from tests.jobs import arguments, make_job, metrics, train
from tests.ranks import run_ranks
from tests.training.test_shard_weights import (
    RUN,
    RUNS,
    SHARDED,
    assert_same_bits,
    make_models_of_cases,
)
from tools.bench.random_model import random_spec
from tools.bench.random_run import make_config, make_distiller, random_batches

pytestmark = pytest.mark.gpu


def need(gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models_of_cases(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("world", RUNS)
def test_divided_weights_have_the_same_bits(world, models):
    need(world)
    run_ranks(world, assert_same_bits, str(models), RUNS[world], "cuda")


def test_a_run_of_stages_has_the_same_bits(tmp_path):
    need(2)
    job = make_job(tmp_path / "job", layers=4)
    options = (*RUN, f"evaluation.paths={job / 'heldout.txt'}")
    options += ("run.device=cuda", "run.deterministic=true", "model.compute_dtype=bfloat16")
    for name, sharded in (("whole", ()), ("divided", (SHARDED,))):
        run_ranks(2, train, arguments(job, tmp_path / name, *options, *sharded))
    whole, divided = (tmp_path / name for name in ("whole", "divided"))
    read = [[line.get("loss") for line in metrics(output)] for output in (whole, divided)]
    assert read[0] == read[1]
    students = [load_file(x / "student" / "model.safetensors") for x in (whole, divided)]
    assert all(torch.equal(value, students[1][key]) for key, value in students[0].items())


MEMORY = {
    "lora": {"trainable.lora.rank": 64, "trainable.lora.dropout": 0},
    "all": {
        "trainable.mode": "all",
        "objective.language_modelling": 1,
        **{f"objective.relations.{name}": 0 for name in "qkv"},
    },
}


def _measure(case: str, file: str) -> None:
    """Take three steps, and write the peak of rank 0 and its estimate in bytes."""
    mesh, results = build_mesh("cuda", 1), []
    for is_sharded in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        config = make_config(
            {
                "data.context_length": 2048,
                "optimizer.global_batch": 2,
                "parallel.shard_weights": is_sharded,
                **MEMORY[case],
            }
        )
        distiller = make_distiller(config, random_spec("llama-1b", 2048), mesh)
        spec = distiller.student.decoder.spec
        for number in range(3):
            distiller.step(random_batches(config, spec, mesh), number)
            if number == 0:
                torch.cuda.reset_peak_memory_stats()  # what loading needs is not estimated
        memory = stage_memory(config, 0, spec, RankLayout(dp=2))
        results.append((torch.cuda.max_memory_allocated(), memory.total))
        del distiller
    if mesh.is_rank_0:
        Path(file).write_text(json.dumps(results))


@pytest.mark.parametrize("case", MEMORY)
def test_memory_falls_as_estimated(case, tmp_path):
    need(2)
    run_ranks(2, _measure, case, str(tmp_path / "memory.json"))
    (whole, _), (divided, estimate) = json.loads((tmp_path / "memory.json").read_text())
    assert divided < whole
    assert divided == pytest.approx(estimate, rel=0.05)
