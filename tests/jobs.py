"""A small job from end to end: a random model with a byte-level tokenizer, text, a command line."""

from __future__ import annotations

import json
import random
import shutil
from multiprocessing import parent_process
from pathlib import Path

import pytest

from tests.command_line import megalard
from tests.models import make_model
from tests.pictures import draw_no_evaluations
from tests.small_tokenizers import save_byte_tokenizer

NATIVE, CONTEXT, BATCH, STEPS = 64, 32, 4, 8

# The study's tests use this name.
save_tokenizer = save_byte_tokenizer


def make_job(folder: Path, layers: int = 2) -> Path:
    """Write ``model/``, ``train.txt`` and ``heldout.txt`` of a job; return the folder."""
    sizes = {"vocab_size": 257, "num_hidden_layers": layers, "max_position_embeddings": NATIVE}
    make_model("llama", folder / "model", **sizes)
    save_byte_tokenizer(folder / "model")
    words = ["tensor", "rank", "row", "mask", "rope", "loss", "of", "the", "and"]
    for number, (name, count) in enumerate((("train", 1500), ("heldout", 300))):
        chosen = random.Random(number).choices(words, k=count)
        (folder / f"{name}.txt").write_text(" ".join(chosen))
    return folder


def arguments(job: Path, output: Path | str, *overrides: str) -> list[str]:
    """Return the overrides of a run that restores the job's model.

    Args:
        overrides: ``key=value``, in addition to or in place of the settings here.
    """
    settings = {
        "model.teacher": job / "model",
        "model.compute_dtype": "float32",
        "rope.factor": 4,
        "trainable.lora": "{rank: 4, alpha: 8, dropout: 0.1}",
        "data.paths": job / "train.txt",
        "data.context_length": CONTEXT,
        "optimizer.steps": STEPS,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 2,
        # As large as the gradients, so that rounding does not decide the sign of an update.
        "optimizer.eps": 1e-4,
        "optimizer.global_batch": BATCH,
        "optimizer.micro_batch": 2,
        "checkpoint.save_every": 0,
        # Nothing is measured, unless a test asks for it.
        "evaluation.holdout": 0,
        "run.output": output,
        "run.device": "cpu",
        # Drawing takes longer than a tiny run.
        "run.report": "false",
    }
    settings |= dict(override.split("=", 1) for override in overrides)
    return [f"--{key}={value}" for key, value in settings.items()]


def train(command: list[str]) -> None:
    """Run ``megalard train`` in this process, which must succeed.

    Forked ranks draw no pictures of evaluations, which would take half a second each.
    """
    with pytest.MonkeyPatch.context() as patch:
        if parent_process() is not None:
            draw_no_evaluations(patch)
        assert megalard("train", *command) == 0


def interrupted(complete: Path, target: Path, step: int = 4) -> Path:
    """Copy a complete run as it was shortly after its checkpoint of ``step``; return the copy."""
    shutil.copytree(complete, target)
    shutil.rmtree(target / "student")
    (target / "finished.json").unlink()
    for path in (target / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    lines = (target / "metrics.jsonl").read_text().splitlines()
    # The steps after the checkpoint have been reported, and the last line only in part.
    (target / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])
    return target


def losses(output: Path, steps: int = STEPS) -> list[float]:
    """Return the loss of every step, each of which must be reported once."""
    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    return [line["loss"] for line in lines]


def metrics(output: Path) -> list[dict]:
    """Return the lines of a run's ``metrics.jsonl``. NaN, which JSON does not have, is an error."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps_reported(output: Path) -> list[int]:
    """Return the steps that a run which is still going has reported so far."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a folder, by its path in the folder.

    The note of which process ran there last is left out: a start that is refused writes it too.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "running.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip_bit(path: Path, position: int = -4) -> None:
    """Change the lowest bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
