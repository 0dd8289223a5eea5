"""The benchmark of a step, on a CPU."""

from __future__ import annotations

import json

import pytest

from megalard.estimate.flops import step_flops
from megalard.parallel.mesh import Mesh, build_mesh
from tests.command_line import one_error, tool
from tests.ranks import run_ranks
from tools.bench.random_model import random_spec
from tools.bench.random_run import make_config

step = tool("bench.step")
SMALL = (
    *("--shape", "tiny", "--lora-rank", "4", "--dtype", "float32", "--device", "cpu"),
    *("--repeats", "2", "--warm-up", "1"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The JSON of both settings of activation checkpointing."""
    file = tmp_path_factory.mktemp("step") / "step.json"
    assert step(*SMALL, "--tokens", 64, "--json", file) == 0
    return json.loads(file.read_text())


def test_it_measures_without_and_with_activation_checkpointing(report):
    assert [r["activation_checkpointing"] for r in report["results"]] == [False, True]
    for result in report["results"]:
        passes, update = result["forward_backward_seconds"], result["update_seconds"]
        assert 0 < passes["shortest"] <= passes["median"] <= passes["longest"]
        rate = 64 / (passes["median"] + update["median"])
        assert result["tokens_per_second"] == pytest.approx(rate)
        assert result["peak_gib"] is None, "the memory of a CPU is not measured"


def test_the_share_of_the_product_counts_the_operations_of_the_trainer(report):
    config = make_config({"trainable.lora.rank": 4, "data.context_length": 64,
                          "optimizer.global_batch": 1})  # fmt: skip
    flops = step_flops(config, random_spec("tiny", 64))
    assert report["product_size"] == 512
    for result in report["results"]:
        seconds = result["forward_backward_seconds"]["median"]
        assert result["of_product"] == pytest.approx(flops / seconds / report["product_flops"])


def test_the_parts_of_a_traced_step_add_up(report):
    for result in report["results"]:
        parts, span = result["trace"]["parts"], result["trace"]["span"]
        assert min(seconds for part, seconds in parts.items() if part != "other") > 0
        assert sum(parts.values()) == pytest.approx(span)
        assert parts["other"] < 0.5 * span


def test_no_number_is_quoted(report):
    keys = {key for result in report["results"] for key in result}
    assert not keys & {"quoted", "recipe_minutes"}, "the tiny shape is not the paper's"


def test_every_number_of_the_report_is_printed(capsys):
    options = ("--tokens", 32, "--activation-checkpointing", "yes", "--longest-kernels", 2)
    assert step(*SMALL, *options) == 0
    printed = capsys.readouterr().out
    assert "reference: 512³ float32 matrix product: " in printed
    row = next(line for line in printed.splitlines() if line.split()[:2] == ["32", "yes"])
    assert row.split()[-1].endswith("%")
    for part in ("teacher", "student", "relations", "backward", "optimizer", "other"):
        assert f" {part} " in printed


def test_the_trace_can_be_left_out(tmp_path, capsys):
    file = tmp_path / "step.json"
    options = ("--tokens", 32, "--activation-checkpointing", "yes", "--no-trace", "--json", file)
    assert step(*SMALL, *options) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert "trace" not in result and result["of_product"] > 0
    assert "traced step" not in capsys.readouterr().out


def test_two_ranks_share_a_step(tmp_path):
    """Tensor-parallel, so that both ranks work on the same blocks."""
    file = tmp_path / "step.json"
    options = ("--tp", 2, "--tokens", 32, "--activation-checkpointing", "no", "--json", file)
    run_ranks(2, _succeed, [str(word) for word in (*SMALL, *options)])
    (result,) = json.loads(file.read_text())["results"]
    assert not result["activation_checkpointing"] and result["of_product"] > 0


def _succeed(words: list[str]) -> None:
    assert step(*words) == 0


def test_lengths_that_ranks_do_not_divide_are_refused(capsys, monkeypatch):
    monkeypatch.setattr("megalard.parallel.mesh.build_mesh", _one_rank)
    assert step(*SMALL, "--cp", 2, "--tokens", 66) == 1
    assert "length 66 in --tokens is not a multiple of 4" in one_error(capsys.readouterr().err)


def _one_rank(device: str, tp: int, cp: int) -> Mesh:
    """Stand in for ``build_mesh``, which would ask for two ranks."""
    return build_mesh(device, 1)
