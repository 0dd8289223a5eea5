"""Tiny runs through ``megalard train`` in this process, with notes of what each step did.

The notes are taken where the parts of a run meet: the batches that a step reads, the gradients
before the update, and the trained tensors before and after it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megalard.distill.lockstep
import megalard.training.saver
from megalard.checkpoint.open import open_model
from megalard.data.batch import Batch
from megalard.data.token_store import TokenStore
from megalard.training.activation_offload import ActivationOffload
from megalard.training.step import Distiller, StepResult
from tests.command_line import megalard as command
from tests.models import make_model
from tests.small_tokenizers import save_byte_tokenizer

M, CONTEXT, STEPS, LAYERS = 64, 32, 3, 2
Tensors = dict[str, torch.Tensor]


@dataclass
class Step:
    """What one step did: on this process, which is the only rank."""

    batches: dict[str, list[Batch]]
    before: Tensors
    gradients: Tensors
    result: StepResult
    after: Tensors
    is_deterministic: bool


@dataclass
class TinyRun:
    """A run that has ended.

    Attributes:
        layers_run: how often a layer of either model was run, over all steps.
        offloads: how many passes kept their tensors in host memory on purpose.
        saving_threads: the threads in which checkpoints were written.
    """

    output: Path
    steps: list[Step] = field(default_factory=list)
    layers_run: int = 0
    offloads: int = 0
    saving_threads: list[str] = field(default_factory=list)

    @property
    def student(self) -> Tensors:
        """The exported tensors."""
        return load_file(self.output / "student" / "model.safetensors")

    @property
    def config(self) -> dict[str, Any]:
        """The exported config.json."""
        return json.loads((self.output / "student" / "config.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> list[float]:
        return [step.result.loss for step in self.steps]

    @property
    def store(self) -> TokenStore:
        return TokenStore.open(self.output / "tokens")

    @property
    def evaluation(self) -> dict[str, Any]:
        return json.loads((self.output / "evaluation.json").read_text())

    def batches(self, stream: str = "main") -> list[Batch]:
        """Return the micro-batches of all steps."""
        return [batch for step in self.steps for batch in step.batches[stream]]

    def folders(self, name: str) -> list[str]:
        """Return what a folder of the output contains."""
        folder = self.output / name
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def make_tiny_job(folder: Path) -> Path:
    """Write ``teacher/``, ``other/`` (other weights) and ``text.txt``; return the folder."""
    for seed, name in enumerate(("teacher", "other")):
        sizes = {"vocab_size": 257, "num_hidden_layers": LAYERS, "max_position_embeddings": M}
        make_model("llama", folder / name, seed, **sizes)
        save_byte_tokenizer(folder / name)
    text = " ".join(f"number {n} and {n * n % 97}" for n in range(400))
    (folder / "text.txt").write_text(text)
    (folder / "heldout.txt").write_text(text[:-1601:-1])
    return folder


def settings_of(job: Path, output: Path, overrides: tuple[str, ...]) -> list[str]:
    """Return the words of a tiny run; ``overrides`` are ``key=value`` or ``-key`` to leave out."""
    settings: dict[str, object] = {
        "model.teacher": job / "teacher",
        "model.compute_dtype": "float32",
        "rope.factor": 4,
        "trainable.lora": "{rank: 4, alpha: 8, dropout: 0}",
        "data.paths": job / "text.txt",
        "data.context_length": CONTEXT,
        "optimizer.steps": STEPS,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 0,
        "optimizer.global_batch": 2,
        "checkpoint.save_every": 0,
        "evaluation.holdout": 0,
        "run.output": output,
        "run.device": "cpu",
        # Drawing takes longer than a tiny run.
        "run.report": "false",
    }
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals:
            settings[key] = value
        else:
            del settings[key.removeprefix("-")]
    return [f"--{key}={value}" for key, value in settings.items()]


def take_notes(patch: pytest.MonkeyPatch, run: TinyRun) -> None:
    """Let the steps of this process note what they do in ``run``."""
    accumulate, update = Distiller.accumulate, Distiller.update
    layer, offload = megalard.distill.lockstep._run, ActivationOffload.forward
    save = megalard.training.saver.save_sharded
    batches: dict[str, list[Batch]] = {}

    def note_batches(self, given, number):
        batches.clear()
        batches.update(given)
        return accumulate(self, given, number)

    def note_update(self, sums, counts, number):
        def copy(of: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
            self.student.complete()
            return {n: of(p).detach().clone() for n, p in self.student.trained.items()}

        before = copy(lambda p: p)
        gradients = {n: g.detach().clone() for n, g in self.masters.local_gradients()}
        result = update(self, sums, counts, number)
        deterministic = torch.are_deterministic_algorithms_enabled()
        after = copy(lambda p: p)
        run.steps.append(Step(dict(batches), before, gradients, result, after, deterministic))
        return result

    def note_layer(*arguments):
        run.layers_run += 1
        return layer(*arguments)

    def note_offload(self):
        run.offloads += 1
        return offload(self)

    def note_save(*arguments):
        run.saving_threads.append(threading.current_thread().name)
        return save(*arguments)

    patch.setattr(Distiller, "accumulate", note_batches)
    patch.setattr(Distiller, "update", note_update)
    patch.setattr(megalard.distill.lockstep, "_run", note_layer)
    patch.setattr(ActivationOffload, "forward", note_offload)
    patch.setattr(megalard.training.saver, "save_sharded", note_save)


def tiny_run(job: Path, output: Path, overrides: tuple[str, ...]) -> TinyRun:
    """Train with some overrides; the run must succeed."""
    run = TinyRun(output)
    with pytest.MonkeyPatch.context() as patch:
        take_notes(patch, run)
        words = settings_of(job, output, overrides)
        try:
            assert command("train", *words) == 0
        finally:
            torch.use_deterministic_algorithms(False)
    return run


def changed(run: TinyRun, teacher: Path) -> set[str]:
    """Return the names of the exported tensors that are not the teacher's."""
    weights, student = open_model(teacher).weights, run.student
    return {name for name in weights.names() if not torch.equal(weights.read(name), student[name])}


def projections(*kinds: str, layers: tuple[int, ...] = (0, 1)) -> set[str]:
    """Return the names of the weights of some projections."""
    return {f"model.layers.{n}.self_attn.{k}_proj.weight" for n in layers for k in kinds}
