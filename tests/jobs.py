"""A whole small job: a random model with a byte-level tokenizer, text, and the command line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megalard.train import main
from tests.models import make_model

NATIVE, CONTEXT, BATCH, STEPS = 64, 32, 4, 8


def save_tokenizer(folder: Path) -> None:
    """One id a byte, and ``</s>`` = 256 to end a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"</s>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def make_job(folder: Path) -> Path:
    """``model/``, ``train.txt`` and ``heldout.txt`` of a job."""
    make_model("llama", folder / "model", vocab_size=257, max_position_embeddings=NATIVE)
    save_tokenizer(folder / "model")
    words = ["tensor", "rank", "row", "mask", "rope", "loss", "of", "the", "and"]
    for number, (name, count) in enumerate((("train", 1500), ("heldout", 300))):
        chosen = random.Random(number).choices(words, k=count)
        (folder / f"{name}.txt").write_text(" ".join(chosen))
    return folder


def arguments(job: Path, output: Path | str, *overrides: str) -> list[str]:
    """The command line of a run that restores ``job``'s model; overrides are ``key=value``."""
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
        # of the gradients' size, so that rounding does not decide the sign of an update
        "optimizer.eps": 1e-4,
        "optimizer.global_batch": BATCH,
        "optimizer.micro_batch": 2,
        "run.output": output,
        "run.device": "cpu",
    }
    settings |= dict(override.split("=", 1) for override in overrides)
    return [f"--{key}={value}" for key, value in settings.items()]


def interrupted(whole: Path, target: Path, step: int = 4) -> Path:
    """The output directory of a run as it was shortly after its checkpoint of ``step``."""
    shutil.copytree(whole, target)
    shutil.rmtree(target / "student")
    for path in (target / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    lines = (target / "metrics.jsonl").read_text().splitlines()
    # the steps after the checkpoint were reported, and the last line only in part
    (target / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])
    return target


def losses(output: Path) -> list[float]:
    """The loss of every step, none of them missing or told twice."""
    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def metrics(output: Path) -> list[dict]:
    """The lines of a run's ``metrics.jsonl``; NaN, which is not JSON, is an error."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(capsys, command: list[str]) -> str:
    """The one line a run ends with that finds bad input."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("megalard: error: ")]
    assert len(lines) == 1 and printed.count("error") >= 1 and "Traceback" not in printed
    assert printed.rstrip().endswith(lines[0]), "the sentence runs over several lines"
    return lines[0]
