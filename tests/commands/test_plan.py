"""``megalard plan``: what it reports, and when it fails."""

from __future__ import annotations

import json
import re

import pytest

from tests.command_line import megalard, refusal
from tools.bench.random_model import random_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The config.json of LLaMA2-7B."""
    path = tmp_path_factory.mktemp("plan") / "llama2-7b.json"
    path.write_text(json.dumps(random_config("llama2-7b", 4096)))
    return path


def plan(model, *words: object) -> int:
    return megalard("plan", "--model", model, *words)


def test_layouts_that_fit_are_ranked_by_time(model, capsys):
    assert plan(model, "--config", "llama2-7b-x8", "--gpus", "8 x H100 80GB") == 0
    printed = capsys.readouterr().out
    assert "GPUs      8 x H100 (79.1 GiB)" in printed
    # 6.74B weights of two bytes, and 805M LoRA elements of two bytes on each of 8 GPUs and of
    # 4 + 8 + 4 bytes over all of them.
    for line in (
        r"weights of the teacher +12\.55 GiB",
        r"weights of the student alone +1\.50 GiB",
        r"fp32 weights that are trained +0\.38 GiB",
        r"moments of AdamW +0\.75 GiB",
        r"gradients +0\.38 GiB",
    ):
        assert re.search(line, printed), line
    rows = re.findall(r"^ +(\d+) +(\d+) +(\d+) +([\d.]+) +([\d.]+) +[\d,]+ ", printed, re.MULTILINE)
    assert len(rows) == 10 and all(int(dp) * int(cp) * int(tp) == 8 for dp, cp, tp, *_ in rows)
    times = [float(seconds) for *_, seconds in rows]
    assert times == sorted(times)
    tokens_per_step = int(re.search(r"steps of ([\d,]+) tokens", printed)[1].replace(",", ""))
    rates = re.findall(r"^ +\d+ +\d+ +\d+ +[\d.]+ +[\d.]+ +([\d,]+) ", printed, re.MULTILINE)
    for seconds, rate in zip(times, rates, strict=True):
        assert int(rate.replace(",", "")) * seconds == pytest.approx(tokens_per_step, rel=0.01)
    assert "slower layouts" not in printed, "all layouts are shown"
    assert "faster: parallel.activation_checkpointing false takes" in printed


def test_what_to_change_is_named_with_what_it_saves(model, capsys):
    words = ("--config", "longred-llama2-7b-x8", "--gpus", "1 x H100 80GB")
    assert plan(model, *words, "--parallel.activation_checkpointing", "false") == 1
    printed = capsys.readouterr().out
    assert "no layout fits: dp 1 x cp 1 x tp 1 needs least, and lacks " in printed
    saved = re.search(
        r"activation checkpointing \(parallel.activation_checkpointing true\) saves ([\d.]+) GiB "
        r"per GPU, which is not enough alone",
        printed,
    )
    # The layers' activations at 32768 tokens: some 130 kB per token and layer.
    assert saved and 100 < float(saved[1]) < 160
    assert re.search(r"all of these together .* and then dp 1 x cp 1 x tp 1 fits", printed)
    assert re.search(r"\d x H100 .* fit it without a change, with dp \d x cp \d x tp \d", printed)


def test_the_columns_of_two_stages_are_aligned(model, capsys):
    assert plan(model, "--config", "linearard-llama2-7b-x8", "--gpus", "8 x H100 80GB") == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if "s per step" in line)
    rows = [line for line in lines[head + 1 :] if re.match(r"^ +\d+ +\d+ +\d+ ", line)]
    assert rows and {len(line.split(" within")[0]) for line in rows} == {len(lines[head])}


ALL_WEIGHTS = (
    *("--trainable.mode", "all", "--objective.language_modelling", 1, "--objective.relations.q", 0),
    *("--objective.relations.k", 0, "--objective.relations.v", 0),
)
PARAMETERS = 6_738_415_616  # of LLaMA2-7B


def test_dividing_weights_is_named_with_what_it_saves(model, capsys):
    """Three GPUs, which tp does not divide: a third of the layers' weights, and two layers."""
    words = ("--config", "llama2-7b-x8", "--gpus", "3 x RTX 4090", "--gpu-memory", 14)
    words += ("--optimizer.global_batch", 3)
    assert plan(model, *words) == 1
    printed = capsys.readouterr().out
    saved = re.search(r"\(parallel.shard_weights true\) saves ([\d.]+) GiB per GPU", printed)
    per_layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008) / 2**30
    assert saved and float(saved[1]) == pytest.approx((32 * 2 / 3 - 2) * per_layer, rel=0.05)


def test_a_model_whose_step_waits_for_its_host_is_named(model, capsys):
    said = "so small a step may wait for the host, which launches its kernels"
    for tokens, is_small in ((256, True), (4096, False)):
        words = ("--data.context_length", tokens, "--gpus", "1 x H100")
        assert plan(model, *words) == 0
        assert (said in capsys.readouterr().out) == is_small


def test_all_weights_of_7b_fit_on_two_gpus_because_they_divide_the_state(model, capsys):
    assert plan(model, *ALL_WEIGHTS, "--gpus", "2 x H100", "--json") == 0
    layouts = json.loads(capsys.readouterr().out)["layouts"]
    (dp2,) = (layout for layout in layouts if layout["dp"] == 2)
    kinds = dp2["kinds"]
    assert kinds["weights of the student alone"] == 2 * PARAMETERS
    # Every tensor has an even number of rows, so that each share is a half.
    assert kinds["fp32 weights that are trained"] == 4 * PARAMETERS // 2
    assert (
        plan(model, *ALL_WEIGHTS, "--gpus", "2 x H100", "--parallel.shard_optimizer", "false") == 0
    )
    printed = capsys.readouterr().out
    assert not re.search(r"^ +2 +1 +1 ", printed, re.MULTILINE), "whole, only tp 2 fits"


def test_on_one_gpu_state_in_host_memory_is_named_with_what_it_saves(model, capsys):
    """Masters and moments leave; weights in bf16 come. AdamW's 16 bytes per parameter are there."""
    assert plan(model, *ALL_WEIGHTS, "--gpus", "1 x H100") == 1
    printed = capsys.readouterr().out
    saved = re.search(r"\(parallel.offload_optimizer true\) saves ([\d.]+) GiB per GPU", printed)
    assert saved and float(saved[1]) == pytest.approx((12 - 2) * PARAMETERS / 2**30, rel=0.04)
    assert "parallel.gradient_dtype" not in printed, "gradients of one GPU are not divided"
    words = ("--gpus", "1 x H100", "--parallel.offload_optimizer", "true")
    assert plan(model, *ALL_WEIGHTS, *words) == 0
    printed = capsys.readouterr().out
    assert "optimizer's state in host memory: 100.41 GiB per GPU, 100.4 GiB per node" in printed


def test_gradients_in_bf16_are_named_where_they_save(model, capsys):
    words = ("--gpus", "1 x A100 40GB", "--parallel.offload_optimizer", "true")
    assert plan(model, *ALL_WEIGHTS, *words) == 1
    printed = capsys.readouterr().out
    saved = re.search(r"\(parallel.gradient_dtype bfloat16\) saves ([\d.]+) GiB", printed)
    assert saved and float(saved[1]) == pytest.approx(2 * PARAMETERS / 2**30, rel=0.04)


def test_the_largest_stage_decides_the_memory(model, capsys):
    words = ("--config", "linearard-llama2-7b-x8", "--gpus", "8 x H100 80GB", "--json")
    assert plan(model, *words) == 0
    report = json.loads(capsys.readouterr().out)
    first = report["layouts"][0]
    assert first["stage"] == "long" and set(first["seconds_per_step"]) == {"ard", "long"}
    steps = {"ard": 144, "long": 29}
    total = sum(first["seconds_per_step"][name] * count for name, count in steps.items())
    assert first["seconds"] == pytest.approx(total)


def test_the_stage_that_keeps_most_in_host_memory_decides_it(model, capsys):
    """Here a different stage needs most of the GPU's memory."""
    stages = {
        "all": {
            "trainable": {"mode": "all"},
            "objective": {"language_modelling": 1},
            "data": {"context_length": 64},
        },
        "lora": {"optimizer": {"micro_batch": 8, "global_batch": 64}},
    }
    flags = ("--gpus", "8 x H200", "--json", "--parallel.offload_optimizer", "true")
    assert plan(model, *flags, f"--stages={json.dumps(stages)}") == 0
    layouts = json.loads(capsys.readouterr().out)["layouts"]
    (layout,) = (layout for layout in layouts if (layout["dp"], layout["tp"]) == (8, 1))
    assert layout["stage"] == "lora"
    # Masters, both moments and gradients of all weights in fp32, divided over 8 GPUs.
    state = layout["host_kinds"]["optimizer's state in host memory"]
    assert state == pytest.approx(16 * PARAMETERS / 8, rel=1e-3)


def test_no_text_and_no_output_are_needed(model, capsys):
    assert plan(model, "--gpus", "H200", "--streams={a: {objective: {logits_kl: 1}}}") == 0
    assert "1 x H200" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", "8 x Z1"], "the GPU 'Z1' is not in the table (B200, H200, H100 PCIe, H100"),
        (["--gpus", "0 x H100"], "--gpus '0 x H100' is not a number and a type of GPUs"),
        (["--gpus", "2 x H100 94GB"], "give --gpu-memory GIB if yours has another size"),
        (
            ["--gpus", "3 x H100"],
            "a global batch of 8 does not divide into micro-batches of 1 on 3",
        ),
        (["--gpus", "H100", "--data.context_length", "8K"], "longer than the teacher's native"),
        (["--gpus", "H100", "--optimizer.step", "3"], "the nearest known one is 'optimizer.steps'"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(words, sentence, model, capsys):
    assert sentence in refusal(capsys, "plan", "--model", model, *words)


def test_a_file_that_is_no_config_is_refused(tmp_path, capsys):
    words = ("plan", "--gpus", "H100", "--model")
    (tmp_path / "a.json").write_text("{")
    assert "is not JSON" in refusal(capsys, *words, tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[]")
    assert "does not hold a JSON object" in refusal(capsys, *words, tmp_path / "b.json")
    assert "there is no file" in refusal(capsys, *words, tmp_path / "c.json")


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--host-memory", "much", "much is not a positive number"),
        ("--gpu-memory", "nan", "nan is not a positive number"),
        ("--network", "-3", "-3 is not a positive number"),
        ("--nodes", "two", "two is not a number of nodes: give 1 or more"),
    ],
)
def test_a_flag_that_is_no_number_is_refused(flag, value, sentence, model, capsys):
    with pytest.raises(SystemExit):
        plan(model, "--gpus", "1 x H100", flag, value)
    assert f"argument {flag}: {sentence}\n" in capsys.readouterr().err
