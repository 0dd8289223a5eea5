"""A job from start to end, by one process and by two ranks."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalard.config.file import load_config
from megalard.config.schema import to_dict
from megalard.data.token_store import TokenStore
from megalard.evaluation.report import read_json
from megalard.training.step import Distiller
from tests.command_line import refusal
from tests.jobs import BATCH, CONTEXT, NATIVE, STEPS, arguments, make_job, metrics, train
from tests.models import scale_rope
from tests.ranks import run_ranks

FIGURES = ("loss", "loss_q", "loss_k", "loss_v", "gradient_norm", "learning_rate")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job."""
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def one(job):
    """The output directory of a run by one process, whose output is in ``printed``."""
    output = job / "runs" / "one"
    options = ["checkpoint.export_every=3", f"evaluation.paths={job / 'heldout.txt'}"]
    with open(job / "printed", "w") as file, redirect_stdout(file):
        train(arguments(job, output, *options))
    return output


@pytest.fixture(scope="module")
def two(job):
    """The same run by two tensor-parallel ranks."""
    output = job / "runs" / "two"
    options = ["parallel.tp=2", f"evaluation.paths={job / 'heldout.txt'}"]
    run_ranks(2, train, arguments(job, output, *options))
    return output


def test_the_output_directory_has_all_of_a_run(one, job):
    assert sorted(path.name for path in one.iterdir()) == [
        "evaluation-tokens",
        "evaluation.json",
        "evaluation.png",
        "finished.json",
        "metrics.jsonl",
        "run.json",
        "running.json",
        "step-000003",
        "step-000006",
        "student",
        "summary.json",
        "tensorboard",
        "tokens",
    ]
    config = load_config(
        None,
        arguments(job, one, "checkpoint.export_every=3", f"evaluation.paths={job / 'heldout.txt'}"),
    )
    assert json.loads((one / "run.json").read_text()) == to_dict(config)
    (events,) = (one / "tensorboard").iterdir()
    assert all(tag.encode() in events.read_bytes() for tag in FIGURES)


def test_every_save_is_a_model_with_its_tokenizer(one, job):
    base = load_file(job / "model" / "model.safetensors")
    trained = set()
    for name in ("step-000003", "step-000006", "student"):
        model = AutoModelForCausalLM.from_pretrained(one / name)
        assert model.config.max_position_embeddings == 4 * NATIVE
        assert AutoTokenizer.from_pretrained(one / name).eos_token == "</s>"
        tensors = load_file(one / name / "model.safetensors")
        changed = {key for key, value in tensors.items() if not torch.equal(value, base[key])}
        assert changed == {
            key for key in base if key.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        }
        trained.add(float(tensors["model.layers.0.self_attn.q_proj.weight"].double().sum()))
    assert len(trained) == 3, "two saves are the same"


def test_metrics_have_every_step(one):
    lines = metrics(one)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in lines] == [n * BATCH * CONTEXT for n in range(1, STEPS + 1)]
    # Two steps of warm-up to 0.01, and a cosine of six steps to 0.9 of it: 0.95 +- 0.05 cos.
    cosines = [3**0.5 / 2, 0.5, 0, -0.5, -(3**0.5) / 2, -1]
    expected = [0.005, 0.01, *(0.01 * (0.95 + 0.05 * cosine) for cosine in cosines)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected)
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[f"loss_{name}"] for name in "qkv"))
        assert line["gradient_norm"] > 0 and line["tokens_per_second"] > 0
        assert line["memory_gib"] > 0 and line["skipped"] is None


def test_the_loss_goes_down(job, tmp_path):
    """The text is one batch, so that the loss of every step is of the same blocks."""
    text = tmp_path / "short.txt"
    text.write_text((job / "train.txt").read_text()[: BATCH * CONTEXT])
    lora = "trainable.lora={rank: 8, alpha: 16, dropout: 0}"
    train(arguments(job, tmp_path / "output", f"data.paths={text}", lora, "optimizer.eps=1e-8"))
    losses = [line["loss"] for line in metrics(tmp_path / "output")]
    assert losses[-1] < 0.7 * losses[0]
    assert losses == sorted(losses, reverse=True)


def test_two_ranks_report_the_global_means_of_one(one, two):
    """LoRA's dropout is on, and its masks are the same too."""
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        for key in FIGURES:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (ours["step"], key)
    first, second = (read_json(output / "evaluation.json")[0] for output in (one, two))
    for a, b in zip(first, second, strict=True):
        assert a.name == b.name
        for length, measured in a.results.by_length.items():
            assert b.results.by_length[length].loss == pytest.approx(measured.loss, rel=1e-3)


def test_the_evaluation_compares_teacher_scaled_and_restored(one, job):
    entries, restoration = read_json(one / "evaluation.json")
    assert [entry.name for entry in entries] == ["teacher", "scaled", "restored"]
    assert (restoration.native_window, restoration.factor) == (NATIVE, 4)
    assert [entry.tokens for entry in entries] == [0, 0, STEPS * BATCH * CONTEXT]
    for entry in entries:
        assert sorted(entry.results.by_length) == [16, 32, 64, 128, 256]
    _, scaled, restored = entries
    assert restored.short_mean("kl", NATIVE) < scaled.short_mean("kl", NATIVE)
    assert restored.results.by_length[64].agreement is not None
    assert restored.results.by_length[128].agreement is None
    assert (one / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert (one / "evaluation.png").stat().st_size > 1000
    printed = (job / "printed").read_text()
    assert f"step {STEPS}/{STEPS}" in printed and "Perplexity by context length" in printed


def poison(monkeypatch, step: int | None, tensor: str) -> None:
    """Put an infinity into one gradient of a step, counted from 1; None for every step."""
    accumulate = Distiller.accumulate

    def poisoned(self, batches, number):
        result = accumulate(self, batches, number)
        if step is None or number == step - 1:
            self.student.trained[tensor].grad.view(-1)[3] = float("inf")
        return result

    monkeypatch.setattr(Distiller, "accumulate", poisoned)


TENSOR = "model.layers.1.self_attn.k_proj.lora_B"


def test_a_gradient_that_is_not_finite_stops_the_run(job, tmp_path, capsys, monkeypatch):
    poison(monkeypatch, 3, TENSOR)
    line = refusal(capsys, "train", *arguments(job, tmp_path / "output"))
    assert "step 3:" in line and "on rank 0" in line and f"in {TENSOR}:" in line
    assert [line["step"] for line in metrics(tmp_path / "output")] == [1, 2]
    assert not (tmp_path / "output" / "student").exists()


def test_a_step_that_is_not_finite_can_be_skipped(job, tmp_path, capsys, monkeypatch):
    poison(monkeypatch, 3, TENSOR)
    steps = []
    step = Distiller.step

    def watched(self, batches, number):
        before = {name: value.clone() for name, value in self.student.trained.items()}
        result = step(self, batches, number)
        same = all(torch.equal(before[name], v) for name, v in self.student.trained.items())
        steps.append((number + 1, same))
        return result

    monkeypatch.setattr(Distiller, "step", watched)
    command = arguments(job, tmp_path / "output", "run.non_finite=skip", "run.log_every=4")
    train([*command, "--optimizer.steps=4"])
    assert steps == [(1, False), (2, False), (3, True), (4, False)]
    assert (tmp_path / "output" / "student" / "model.safetensors").exists()
    # A skipped step is reported although it is not one of every four.
    lines = metrics(tmp_path / "output")
    assert [line["step"] for line in lines] == [3, 4]
    assert "step 3:" in lines[0]["skipped"] and TENSOR in lines[0]["skipped"]
    assert lines[0]["gradient_norm"] is None and lines[1]["skipped"] is None
    assert f"rank 0, in {TENSOR}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.mlp.up_proj.weight", "nan"),
        # The objective does not reach these three.
        ("model.layers.1.mlp.down_proj.weight", "inf"),
        ("model.norm.weight", "nan"),
        ("lm_head.weight", "-inf"),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_that_are_not_finite_are_refused(role, name, value, job, tmp_path, capsys):
    model = shutil.copytree(job / "model", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[-1] = float(value)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    command = arguments(job, tmp_path / "output", f"model.{role}={model}")
    for options in ([], ["--preflight"]):
        line = refusal(capsys, "train", *options, *command)
        assert f"tensor {name} in {model} holds NaN or infinity" in line


def test_a_run_of_which_every_step_was_skipped_fails(job, tmp_path, capsys, monkeypatch):
    """Started again it fails again, because the checkpoint knows of the skipped steps."""
    poison(monkeypatch, None, TENSOR)
    options = ("run.non_finite=skip", "checkpoint.save_every=2", "optimizer.steps=4")
    command = arguments(job, tmp_path / "output", *options)
    for _ in range(2):
        line = refusal(capsys, "train", *command)
        assert "all 4 steps were skipped, so the student is as it was" in line
    assert not (tmp_path / "output" / "student").exists()


def test_skipped_steps_are_counted_over_starts(job, tmp_path, capsys, monkeypatch):
    """Step 1 is skipped, and the run is stopped and started again."""
    poison(monkeypatch, 1, TENSOR)
    options = ("run.non_finite=skip", "checkpoint.save_every=2", "optimizer.steps=4")
    command = arguments(job, tmp_path / "output", *options)
    train(command)
    assert "warning: 1 of 4 steps were skipped" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "output" / "student")
    train(command)
    assert "warning: 1 of 4 steps were skipped" in capsys.readouterr().out


def test_a_removed_output_directory_is_named(job, tmp_path, capsys, monkeypatch):
    output, step = tmp_path / "output", Distiller.step

    def remove(self, batches, number):
        if number == 1:
            shutil.rmtree(output)
        return step(self, batches, number)

    monkeypatch.setattr(Distiller, "step", remove)
    for options in (["checkpoint.save_every=2"], []):
        line = refusal(capsys, "train", *arguments(job, output, *options))
        assert f"run.output {output} was removed or moved while the run wrote to it" in line
        assert not output.exists()


def test_a_checkpoint_keeps_its_rope_and_is_saved_in_both_spellings(job, tmp_path):
    """transformers 4 would read a file with only the new spelling as native RoPE."""
    student = shutil.copytree(job / "model", tmp_path / "student")
    scale_rope(student)
    options = ["rope.type=checkpoint", f"model.student={student}", "optimizer.steps=1"]
    train(arguments(job, tmp_path / "output", *options))
    config = json.loads((tmp_path / "output" / "student" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["rope_theta"] == 1e4


def test_a_token_cache_is_used_again(job, tmp_path):
    cache = tmp_path / "cache"
    options = [f"data.cache={cache}", "optimizer.steps=1"]
    train(arguments(job, tmp_path / "first", *options))
    made = (cache / "tokens.bin").stat().st_mtime_ns
    train(arguments(job, tmp_path / "second", *options))
    assert (cache / "tokens.bin").stat().st_mtime_ns == made
    assert not (tmp_path / "second" / "tokens").exists()
    # A prepared directory is data as well.
    prepared = arguments(job, tmp_path / "third", f"data.paths={cache}", "optimizer.steps=1")
    train(prepared)
    first, third = (metrics(tmp_path / name)[0]["loss"] for name in ("first", "third"))
    assert first == third and len(TokenStore.open(cache).tokens) > 1000
