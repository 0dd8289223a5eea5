"""plan: the effect of every flag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import megalard, refusal
from tools.bench.random_model import random_config

H100 = "8 x H100 80GB"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The config.json of LLaMA2-7B, alone in a directory."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.json").write_text(json.dumps(random_config("llama2-7b", 4096)))
    return folder


@pytest.fixture
def plan(model, capsys):
    """A function that plans LoRA of LLaMA2-7B with some more words; returns the JSON."""

    def run(*words: object, gpus: str = H100) -> dict:
        given = ("--model", model, "--gpus", gpus, "--json")
        megalard("plan", *given, *words)
        return json.loads(capsys.readouterr().out)

    return run


def test_plan_model(model, capsys):
    """A directory, its config.json, and model.teacher are the same model."""
    words = ("plan", "--gpus", H100)
    assert megalard(*words, "--model", model) == 0
    directory = capsys.readouterr().out
    for other in (("--model", model / "config.json"), ("--model.teacher", model)):
        assert megalard(*words, *other) == 0
        assert capsys.readouterr().out == directory
    assert "give --model MODEL" in refusal(capsys, *words)
    shorter = ("--model", model, "--model.native_context", 2048)
    assert "data.context_length 4096 is longer than the teacher's native window" in refusal(
        capsys, *words, *shorter
    )
    assert "no model directory at /none" in refusal(capsys, *words, "--model", "/none")


def test_plan_config(plan, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("optimizer: {steps: 50}\nparallel: {activation_checkpointing: false}\n")
    again = plan()["layouts"][0]
    first = plan("--config", config)["layouts"][0]
    assert first["bytes"] > 1.3 * again["bytes"]
    assert first["seconds"] == pytest.approx(50 * first["seconds_per_step"]["main"])
    assert plan("--config", "qwen3-8b-yarn-x4")["fits"] is True


def test_plan_gpus(plan):
    assert plan()["gpus"]["per_node"] == 8
    one = plan(gpus="1 x A100 40GB")
    assert one["gpus"]["memory"] == pytest.approx(39.4 * 2**30, rel=0.01)
    assert [layout["dp"] for layout in one["layouts"]] == [1]


def test_plan_nodes(plan):
    layouts = plan("--nodes", 2, "--optimizer.global_batch", 16)["layouts"]
    assert {layout["dp"] * layout["cp"] * layout["tp"] for layout in layouts} == {16}
    assert max(layout["tp"] for layout in layouts) == 8, "tp stays within a node"


def test_plan_gpu_memory(plan):
    assert plan(gpus="1 x H100")["fits"] and not plan("--gpu-memory", 20, gpus="1 x H100")["fits"]


def test_plan_gpu_tflops(plan, model, capsys):
    """An unknown GPU needs its memory and its rate; half of the rate takes twice as long."""
    words = ("plan", "--model", model, "--gpus", "2 x Z1")
    assert "give --gpu-memory GIB and --gpu-tflops N" in refusal(capsys, *words)
    assert "give --gpu-memory GIB" in refusal(capsys, *words, "--gpu-tflops", 989)
    times = [
        plan("--gpu-memory", 80, "--gpu-tflops", rate, gpus="1 x Z1")["layouts"][0]["seconds"]
        for rate in (989, 494.5)
    ]
    assert times[1] == pytest.approx(2 * times[0], rel=0.01)


def test_plan_network(plan):
    """Only exchanges between nodes depend on it."""
    words = ("--nodes", 2, "--optimizer.global_batch", 16)
    slow = plan(*words, "--network", 1)["layouts"]
    fast = plan(*words, "--network", 1000)["layouts"]
    assert min(x["seconds"] for x in slow) > 1.5 * min(x["seconds"] for x in fast)
    assert plan("--network", 1)["layouts"] == plan()["layouts"]
    # Two ranks sum the fp32 gradients of LoRA, 32 layers x 3 pairs of rank 1024: each sends
    # 2 x (1 - 1/2) of them. The default is 50 GB/s.
    sent_bytes = 4 * 32 * 3 * 1024 * (4096 + 4096)
    two_nodes = ("--nodes", 2, "--parallel.shard_optimizer", "false")
    seconds = [
        layout["seconds_per_step"]["main"]
        for network in (("--network", 25), (), ("--network", 100))
        for layout in plan(*two_nodes, *network, gpus="1 x H100 80GB")["layouts"]
        if layout["dp"] == 2
    ]
    assert seconds[0] - seconds[1] == pytest.approx(sent_bytes / 50e9)
    assert seconds[1] - seconds[2] == pytest.approx(sent_bytes / 100e9)


def test_plan_host_memory(plan, model, capsys):
    """All weights of 7B have 16 bytes per parameter in host memory, and pinned tensors more."""
    words = (
        *("--trainable.mode", "all", "--objective.relations", "{q: 0, k: 0, v: 0}"),
        *("--objective.language_modelling", 1, "--parallel.offload_optimizer", "true"),
    )
    needed = plan(*words, gpus="1 x H100")["layouts"][0]["host_bytes"] / 2**30
    assert 16 * 6.74e9 / 2**30 < needed < 24 * 6.74e9 / 2**30
    enough = plan(*words, "--host-memory", needed, gpus="1 x H100")
    assert enough["fits"] and enough["layouts"][0]["host_bytes"] / 2**30 == needed
    given = ("plan", "--model", model, "--gpus", "1 x H100", *words, "--host-memory", 64)
    sentence = refusal(capsys, *given)
    assert f"needs {needed:.1f} GiB of host memory per node (optimizer's state" in sentence
    assert sentence.endswith(
        "but a node has 64.0 GiB: set parallel.offload_optimizer false, or use more nodes"
    )
    both = refusal(capsys, *given, "--parallel.offload", "true")
    assert "set parallel.offload_optimizer or parallel.offload false, or" in both
    assert plan("--host-memory", 1, gpus="1 x H100")["fits"], "nothing is offloaded"


def test_plan_json(plan, model, capsys):
    report = plan()
    assert megalard("plan", "--model", model, "--gpus", H100) == 0
    printed = capsys.readouterr().out
    first = report["layouts"][0]
    assert f"the fastest: --parallel.tp {first['tp']} --parallel.cp {first['cp']}" in printed
    assert sum(first["kinds"].values()) == first["bytes"]
    assert f"{first['bytes'] / 2**30:8.2f} GiB of 79.1 GiB" in printed
