"""A resumed run is the uninterrupted one, on its own layout of ranks or on another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalard.checkpoint.sharded.manifest import read_manifest
from megalard.data.token_store import TokenStore
from megalard.training.run_folder import checkpoint_path
from tests.checkpoint.sharded.damage import rewrite_manifest
from tests.command_line import refusal
from tests.jobs import (
    BATCH,
    CONTEXT,
    arguments,
    flip_bit,
    interrupted,
    losses,
    make_job,
    train,
)
from tests.logits import relative_error
from tests.ranks import run_ranks

SAVE = ("checkpoint.save_every=2", "checkpoint.keep_last=9")
# Two steps follow the checkpoint of step 4: the second begins where the restored state was updated.
STEPS = 6
SHORT = (*SAVE, f"optimizer.steps={STEPS}")
ALL = ("trainable.mode=all", "objective.logits_kl=0.5", "model.compute_dtype=float32")
STREAMS = (
    "trainable.mode=all",
    "streams={long: {objective: {language_modelling: 1}, data: {context_length: 64}, "
    "global_batch: 4}, short: {objective: {hidden_cosine: 5, hidden_depths: [0.5, 1]}, "
    "data: {positions: skip-gaussian}, weight: 0.5}}",
)
# Only the order of summation differs between layouts: fp32 rounding through the remaining steps.
TOLERANCE = 1e-4

# Steps of one micro-batch take half of the time. "one" accumulates two.
AT_ONCE = f"optimizer.micro_batch={BATCH}"
RUNS = {
    "one": (1, ()),
    "tp2": (2, ("parallel.tp=2", AT_ONCE)),
    "dp2": (2, ("checkpoint.asynchronous=false",)),
    "cp2": (2, ("parallel.cp=2", AT_ONCE)),
    "all": (1, (AT_ONCE, *ALL)),
    "all-tp2": (2, ("parallel.tp=2", AT_ONCE, *ALL)),
    "streams": (1, STREAMS),
}
# Which run's checkpoint, on how many ranks, with which options.
RESUMED = {
    "one on one": ("one", 1, ()),
    "tp2 on tp2": ("tp2", 2, ("parallel.tp=2", AT_ONCE)),
    "dp2 on dp2": ("dp2", 2, ("checkpoint.asynchronous=true",)),
    "cp2 on cp2": ("cp2", 2, ("parallel.cp=2", AT_ONCE)),
    "tp2 on one": ("tp2", 1, (AT_ONCE,)),
    "one on tp4": ("one", 4, ("parallel.tp=4", AT_ONCE)),
    "dp2 on one": ("dp2", 1, ()),
    "all on all": ("all", 1, (AT_ONCE, *ALL)),
    "all-tp2 on tp4": ("all-tp2", 4, ("parallel.tp=4", AT_ONCE, *ALL)),
    "streams on streams": ("streams", 1, STREAMS),
    "streams on dp2 cp2": ("streams", 4, ("parallel.cp=2", *STREAMS)),
}


def run(ranks: int, job: Path, output: Path, *options: str) -> None:
    """Train on some ranks."""
    run_ranks(ranks, train, arguments(job, output, *SHORT, *options))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job, and every run of ``RUNS`` without interruption."""
    folder = make_job(tmp_path_factory.mktemp("resume"))
    for name, (ranks, options) in RUNS.items():
        run(ranks, folder, folder / name, *options)
    return folder


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(case, job, tmp_path):
    """Bit for bit on the same layout, and up to rounding on another."""
    name, ranks, options = RESUMED[case]
    output = interrupted(job / name, tmp_path / "output")
    run(ranks, job, output, *options)
    complete = load_file(job / name / "student" / "model.safetensors")
    resumed = load_file(output / "student" / "model.safetensors")
    assert complete.keys() == resumed.keys()
    before, _, after = case.partition(" on ")
    if before == after:
        assert losses(output, STEPS) == losses(job / name, STEPS)
        assert all(torch.equal(resumed[key], value) for key, value in complete.items())
        return
    assert losses(output, STEPS) == pytest.approx(losses(job / name, STEPS), rel=TOLERANCE)
    for key, value in complete.items():
        error = relative_error(resumed[key], value)
        assert error < TOLERANCE, f"{key} is off by {error:.1e}"


def test_it_prints_what_it_resumes_from_and_removes(job, tmp_path, capfd):
    output = interrupted(job / "one", tmp_path / "output")
    (output / "checkpoints" / "step-000006.partial").mkdir()
    for name in ("mine.partial", "notes.removed"):
        (output / "checkpoints" / name).mkdir()
    (output / "checkpoints" / "step-000005.partial").write_text("a file")
    for name in ("step-000002.done-01234567", "step-000003.partial", "step-000007.partial"):
        (output / name).mkdir()
    (output / "step-000007.partial" / ".unfinished").touch()
    train(arguments(job, output, *SHORT))
    printed = capfd.readouterr().out
    assert printed.count("was not finished") == 3
    for name in ("step-000002.done-01234567", "step-000007.partial"):
        assert f"{output / name} is an export that was not finished: it was removed" in printed
    assert {path.name for path in output.glob("step-*")} == {"step-000003.partial"}
    remaining = {path.name for path in (output / "checkpoints").iterdir()}
    assert remaining >= {"mine.partial", "notes.removed", "step-000005.partial"}
    assert "step-000006.partial is a save that was not finished: it was removed" in printed
    assert f"resuming from {output / 'checkpoints' / 'step-000004'} after step 4" in printed
    # Once all steps are done, only the export remains.
    (output / "finished.json").unlink()
    train(arguments(job, output, *SHORT))
    assert f"after step {STEPS}" in capfd.readouterr().out


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(job, tmp_path, capsys):
    output = interrupted(job / "one", tmp_path / "output", step=0)
    train(arguments(job, output, *SHORT))
    expected = f"{output} holds no complete checkpoint: the run begins at the start"
    assert expected in capsys.readouterr().out
    assert losses(output, STEPS) == losses(job / "one", STEPS)


def test_other_text_is_refused(job, tmp_path, capsys):
    output = interrupted(job / "one", tmp_path / "output")
    text = tmp_path / "other.txt"
    text.write_text((job / "train.txt").read_text().upper())
    options = (f"data.cache={tmp_path / 'cache'}", f"data.paths={text}")
    line = refusal(capsys, "train", *arguments(job, output, *SHORT, *options))
    assert f"the text is not the text {checkpoint_path(output / 'checkpoints', 4)} was" in line
    assert line.endswith("restore data.paths, or choose another run.output")


def test_another_student_config_is_refused(job, tmp_path, capsys):
    """Such as another eps, which no setting of the run shows."""
    output = interrupted(job / "one", tmp_path / "output")
    model = shutil.copytree(job / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    line = refusal(capsys, "train", *arguments(job, output, *SHORT, f"model.teacher={model}"))
    assert "the student's norm_eps is not what " in line
    assert "restore the model's config.json and rope.table" in line


@pytest.mark.parametrize("position", [4, -1], ids=["header", "data"])
def test_a_changed_bit_is_reported_with_the_checkpoint_to_resume_from(
    position, job, tmp_path, capsys
):
    output = interrupted(job / "one", tmp_path / "output")
    damaged = checkpoint_path(output / "checkpoints", 4)
    flip_bit(sorted(damaged.glob("optimizer-*.safetensors"))[0], position)
    line = refusal(capsys, "train", *arguments(job, output, *SHORT))
    assert "is damaged" in line
    assert line.endswith(f"; remove {damaged} to resume from step-000002")
    shutil.rmtree(damaged)
    train(arguments(job, output, *SHORT))


def test_the_manifest_describes_the_run(job):
    """Everything that resuming needs, written out."""
    manifest = read_manifest(checkpoint_path(job / "one" / "checkpoints", 4))
    assert manifest.kind == "training" and manifest.config["max_position_embeddings"] == 256
    assert manifest.trained["mode"] == "lora"
    assert manifest.trained["lora"] == {
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.1,
        "targets": ["q", "k", "v"],
    }
    shapes = manifest.trained["tensors"]
    assert len(shapes) == 12 and shapes["model.layers.1.self_attn.k_proj.lora_B"] == [16, 4]
    training, store = manifest.training, TokenStore.open(job / "one" / "tokens")
    blocks = len(store.tokens) // CONTEXT
    assert (training["step"], training["stage"], training["seed"]) == (4, "main", 0)
    assert training["data"] == {
        "main": {
            "tokens": len(store.tokens),
            "tokenizer": store.tokenizer_fingerprint,
            "sources": store.sources_fingerprint,
            "blocks": blocks,
            "blocks_read": 4 * BATCH,
            "next_block": 4 * BATCH % blocks,
            "epoch": 4 * BATCH // blocks,
        }
    }
    assert training["optimizer"]["class"] == "AdamW"
    assert training["optimizer"]["groups"][0]["betas"] == [0.9, 0.95]
    assert training["config"]["rope"]["factor"] == 4


def _remove(*path: str):
    def change(body: dict) -> None:
        for key in path[:-1]:
            body = body[key]
        del body[path[-1]]

    return change


def _set(value: object, *path: str):
    def change(body: dict) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return change


Q = "model.layers.0.self_attn.q_proj.lora_A"
SIGNED = {
    **{
        f"no {key}": (_remove("training", key), "manifest.json")
        for key in ("step", "data", "optimizer", "config")
    },
    "no position": (_remove("training", "data", "main"), "it has no 'main'"),
    "a number for the configuration": (_set(3, "training", "config"), "training.config is 3"),
    "a list for a section": (_set([], "training", "config", "optimizer"), "manifest.json"),
    "no ranks": (_remove("written_by", "ranks"), "it has no 'ranks'"),
    "no groups": (_set([], "training", "optimizer", "groups"), "manifest.json"),
    "no count": (_remove("tensors", f"optimizer.step.{Q}"), f"no tensor optimizer.step.{Q}"),
    "no moment": (_remove("tensors", f"optimizer.exp_avg.{Q}"), f"no tensor optimizer.exp_avg.{Q}"),
    "another generator": (
        _set({"dtype": "U8", "shape": [0], "chunks": []}, "tensors", "rng.cpu.00000"),
        "tensor rng.cpu.00000",
    ),
    "no config": (_set({}, "config"), "has no model_type"),
    "a number for a base": (_set(64, "base"), "manifest.json"),
}


@pytest.mark.parametrize("kind", SIGNED)
def test_a_manifest_that_lacks_an_entry_is_refused_though_it_is_signed(kind, job, tmp_path, capsys):
    change, sentence = SIGNED[kind]
    output = interrupted(job / "one", tmp_path / "output")
    rewrite_manifest(checkpoint_path(output / "checkpoints", 4), change)
    assert sentence in refusal(capsys, "train", *arguments(job, output, *SHORT))


def test_the_settings_of_the_optimizer_are_those_of_the_configuration(job, tmp_path):
    """Words in their place in a manifest would fail in the first step."""
    output = interrupted(job / "one", tmp_path / "output")
    checkpoint = checkpoint_path(output / "checkpoints", 4)
    settings = {"betas": "x", "lr": None, "eps": []}
    rewrite_manifest(
        checkpoint, lambda body: body["training"]["optimizer"]["groups"][0].update(settings)
    )
    train(arguments(job, output, *SHORT))
    assert losses(output, STEPS) == losses(job / "one", STEPS)
