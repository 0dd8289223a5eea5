"""A small job for the campaigns: models of all forms, a text, a run, and its command line."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from megalard import cli
from megalard.quiet import quiet_transformers

STEPS = 8
_WORDS = ["tensor", "rank", "row", "mask", "rope", "loss", "of", "the", "and"]


@dataclass(frozen=True)
class Material:
    """A folder of models, texts and runs, to be copied and damaged.

    Attributes:
        folder: has ``model`` (one file), ``indexed`` (two files), ``sharded``, ``adapter``,
            ``run`` (a complete run, all of whose checkpoints are kept), ``text.txt`` and
            ``text.jsonl``; after ``add_evaluated_run`` also ``evaluated``.
    """

    folder: Path

    def command(self, output: Path | str, *overrides: str) -> list[str]:
        """Return the arguments of ``megalard`` for the run, which writes to ``output``."""
        settings = {
            "model.teacher": self.folder / "model",
            "model.compute_dtype": "float32",
            "rope.factor": 4,
            "trainable.lora": "{rank: 4, alpha: 8, dropout: 0.1}",
            "data.paths": self.folder / "text.txt",
            "data.context_length": 32,
            "optimizer.steps": STEPS,
            "optimizer.learning_rate": 1e-2,
            "optimizer.global_batch": 4,
            "optimizer.micro_batch": 2,
            "checkpoint.save_every": 2,
            "checkpoint.keep_last": 9,
            "evaluation.holdout": 0,
            "run.output": output,
            "run.device": "cpu",
        }
        settings |= dict(override.split("=", 1) for override in overrides)
        return ["train", *(f"--{key}={value}" for key, value in settings.items())]

    def evaluated_command(self, output: Path | str) -> list[str]:
        """Return the arguments of a run with evaluations and validations."""
        return self.command(
            output,
            "evaluation.holdout=256",
            "evaluation.lengths=[16, 32]",
            "evaluation.every=4",
            "checkpoint.keep_last=1",
        )

    def add_evaluated_run(self) -> None:
        """Make a run that has evaluated and validated its student."""
        _quietly(self.evaluated_command(self.folder / "evaluated"))

    def copy(self, name: str, target: Path) -> Path:
        """Copy one of the folders; return the copy."""
        return Path(shutil.copytree(self.folder / name, target))

    def unfinished_run(self, target: Path, step: int = 4) -> Path:
        """Copy the run as it was after the checkpoint of a step; return the copy."""
        output = self.copy("run", target)
        shutil.rmtree(output / "student")
        (output / "finished.json").unlink()
        for path in (output / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        return output


def make_material(folder: Path) -> Material:
    """Write the material, which is the same on every call."""
    material = Material(folder)
    torch.set_num_threads(1)
    _make_model(folder / "model", 0)
    _make_model(folder / "other", 1)
    _cut_in_two(folder / "model", folder / "indexed")
    text = " ".join(random.Random(0).choices(_WORDS, k=1500))
    (folder / "text.txt").write_text(text)
    lines = (json.dumps({"text": text[at : at + 300]}) for at in range(0, len(text), 300))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    _quietly(material.command(folder / "run"))
    _quietly(["convert", "import", folder / "model", folder / "sharded"])
    _quietly(["convert", "import", folder / "other", folder / "other-sharded"])
    newest = folder / "run" / "checkpoints" / f"step-{STEPS:06d}"
    _quietly(["convert", "export", newest, folder / "adapter", "--format", "peft"])
    return material


def _quietly(words: list) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main([str(word) for word in words])
    assert status == 0, words


def _make_model(folder: Path, seed: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tools.campaigns.drawn_tokenizers import make_byte_tokenizer

    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=257,
        eos_token_id=256,
    )
    torch.manual_seed(seed)
    with quiet_transformers():
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        model.save_pretrained(folder)
    make_byte_tokenizer(folder)


def _cut_in_two(model: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, target)
    (target / "model.safetensors").unlink()
    state = load_file(model / "model.safetensors")
    names, places = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, target / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
