"""Divided weights: the same bits as whole ones, in less memory, on every kind of layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalard.distill.student import whole_value
from megalard.parallel.divided_weights import DividedParameter
from megalard.parallel.mesh import build_mesh
from tests.jobs import arguments, interrupted, make_job, metrics, train
from tests.parity.cases import ALL_CASES, make_config, make_models
from tests.parity.worker import make_distiller, micro_batches
from tests.ranks import run_ranks

# The name of the case, cp, tp, the dtype, and settings of the section parallel.
Layout = tuple[str, int, int, str, dict]
CASES = ["lora-qkvo-grouped", "weights-one-kv-head", "all-everything", "all-longred"]


def take_steps(folder: Path, name: str, mesh, cp: int, tp: int, dtype: str, **parallel):
    """Return the results of two steps as bytes decide them: losses, gradients and weights."""
    case = ALL_CASES[name]
    config = make_config(case, folder / name, tp, cp, dtype)
    options = {"shard_optimizer": True, **parallel}
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **options))
    distiller = make_distiller(config, mesh)
    results = []
    for step in range(2):
        result = distiller.step(micro_batches(case, step, mesh, 1), step)
        results.append((result.loss, result.gradient_norm, result.parts))
    masters = distiller.masters
    values = {f"master {name}": masters.value(name).clone() for name in masters.parts}
    values |= {f"gradient {name}": masters.gradient(name).clone() for name in masters.parts}
    distiller.student.complete()
    for name, parameter in distiller.student.decoder.named_parameters():
        values[f"weight {name}"] = whole_value(parameter).clone()
    return distiller, results, values


def assert_same_bits(folder: str, runs: list[Layout], device: str) -> None:
    """Take the same steps with whole and with divided weights; every rank calls this."""
    if device == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    for name, cp, tp, dtype, options in runs:
        mesh = build_mesh(device, tp, cp)
        arguments = (Path(folder), name, mesh, cp, tp, dtype)
        _, whole, expected = take_steps(*arguments, **options)
        distiller, divided, values = take_steps(*arguments, shard_weights=True, **options)
        assert divided == whole, (name, cp, tp)
        assert values.keys() == expected.keys()
        for key, value in values.items():
            assert torch.equal(value, expected[key]), (name, cp, tp, key)
        assert any(isinstance(p, DividedParameter) for p in distiller.student.decoder.parameters())


RUNS = {
    2: [
        ("lora-qkvo-grouped", 1, 1, "float32", {}),
        ("all-everything", 2, 1, "float32", {"activation_checkpointing": False}),
        ("all-longred", 1, 1, "bfloat16", {"activation_checkpointing": True}),
        ("weights-one-kv-head", 1, 1, "float32", {"offload_optimizer": True}),
        ("lora-qkvo-grouped", 2, 1, "float32", {"offload": True, "shard_optimizer": False}),
    ],
    4: [
        ("all-everything", 1, 2, "float32", {}),
        ("lora-qkvo-grouped", 2, 2, "bfloat16", {}),
    ],
    8: [("weights-one-kv-head", 1, 4, "float32", {})],
}


def make_models_of_cases(folder: Path) -> Path:
    """Make the models of all cases, each in a directory of its name; return the folder."""
    for name in CASES:
        (folder / name).mkdir()
        make_models(ALL_CASES[name], folder / name)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models_of_cases(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("world", RUNS)
def test_divided_weights_have_the_same_bits(world, models):
    run_ranks(world, assert_same_bits, str(models), RUNS[world], "cpu")


# LoRA, and then all weights, of a model of four layers. Three windows of two ranks: one rank has no
# window in the second pass of the long ones.
RUN = (
    "stages={first: {}, last: {trainable: {mode: all}, objective: {logits_kl: 1}}}",
    "optimizer.steps=4",
    "checkpoint.save_every=1",
    "checkpoint.keep_last=9",
    "evaluation.every=3",
    "evaluation.lengths=[32,64]",
    "evaluation.max_tokens=192",
    "evaluation.validation_tokens=192",
)
SHARDED = "parallel.shard_weights=true"


def run(ranks: int, job: Path, output: Path, *options: str) -> None:
    """Train on some ranks."""
    held_out = f"evaluation.paths={job / 'heldout.txt'}"
    run_ranks(ranks, train, arguments(job, output, *RUN, held_out, *options))


def values(output: Path) -> list[dict]:
    """Return what was measured of every step: losses, gradients and validations, and no times."""
    names = ("step", "loss", "grad", "valid", "gap", "kl", "agree")
    lines = [{k: v for k, v in line.items() if k.startswith(names)} for line in metrics(output)]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 9)]
    return lines


def assert_same_run(output: Path, expected: Path) -> None:
    """Compare losses, validations, evaluations and the students of two runs."""
    assert values(output) == values(expected)
    for name in ("student", "stage-first"):
        if (expected / name).exists():
            student, whole = (load_file(x / name / "model.safetensors") for x in (output, expected))
            assert student.keys() == whole.keys()
            assert all(torch.equal(value, whole[key]) for key, value in student.items())
    evaluations = [json.loads((x / "evaluation.json").read_text()) for x in (output, expected)]
    assert evaluations[0] == evaluations[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job, with runs of whole and of divided weights."""
    folder = make_job(tmp_path_factory.mktemp("job"), layers=4)
    run(2, folder, folder / "whole")
    run(2, folder, folder / "divided", SHARDED)
    return folder


def test_a_run_of_stages_has_the_same_bits(job):
    assert_same_run(job / "divided", job / "whole")


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("before", ["whole", "divided"])
def test_a_run_is_resumed_with_divided_weights_or_without(step, before, job, tmp_path):
    """In either stage and between them; the checkpoint does not know what divided the weights."""
    output = interrupted(job / before, tmp_path / "output", step)
    lines = (job / before / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in lines if json.loads(line)["step"] <= step]
    (output / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run(2, job, output, *([SHARDED] if before == "whole" else []))
    assert_same_run(output, job / "whole")


def test_all_weights_in_bfloat16_are_measured_before_the_first_step(job, tmp_path):
    """The trained rows are fp32 then, and are gathered in the compute dtype."""
    common = (
        "model.compute_dtype=bfloat16",
        "trainable.mode=all",
        "optimizer.steps=1",
        f"evaluation.paths={job / 'heldout.txt'}",
        "evaluation.lengths=[32,64]",
        "evaluation.max_tokens=192",
    )
    evaluations = []
    for name, options in (("whole", ()), ("divided", (SHARDED,))):
        run_ranks(2, train, arguments(job, tmp_path / name, *common, *options))
        evaluations.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
    assert evaluations[0] == evaluations[1]
