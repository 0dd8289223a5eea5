"""The directory of the study of a pre-trained model, and the configuration of its runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from megalard.checkpoint.open import open_model
from megalard.config.file import load_config
from megalard.config.schema import Config
from megalard.data.token_store import TokenStore
from megalard.data.tokenizer import Tokenizer, load_tokenizer
from megalard.evaluation.measure import cut_windows
from megalard.evaluation.samples import sentence_filler
from megalard.evaluation.suite import Suite, make_samples
from megalard.parallel.mesh import Mesh, build_mesh
from tools.study.pretrained.choices import Row, encode
from tools.study.pretrained.corpus import CORPUS
from tools.study.pretrained.methods import RECIPE_WINDOW, recipe
from tools.study.pretrained.questions import Question, read_questions

# The share of a run's tokens that its first phase reads, if it has two.
_FIRST_SHARE = 0.5
TASKS = ("passkey", "multi_key")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        validation: tokens per domain and length on validation text.
        short: tokens per domain and length of short text.
        long: tokens per domain in windows of the student's length.
        samples: samples per task, length and depth.
    """

    validation: int = 32_768
    short: int = 65_536
    long: int = 131_072
    samples: int = 3


class Study:
    """A study, with everything that its runs are measured by.

    Args:
        folder: holds ``teacher/``, ``corpus/`` and ``choices/``.
        domain: the domain whose text restores.
        device: ``auto``, ``cpu`` or ``cuda``.
        sizes: how much is measured.
        questions: the largest number of questions per task.
    """

    def __init__(
        self,
        folder: Path,
        domain: str,
        device: str,
        sizes: Sizes | None = None,
        questions: int | None = None,
    ):
        self.folder, self.domain, self.device = folder, domain, device
        self.sizes, self._questions = sizes or Sizes(), questions

    @cached_property
    def mesh(self) -> Mesh:
        """A mesh of this process alone."""
        return build_mesh(self.device, 1)

    @cached_property
    def native_window(self) -> int:
        """The teacher's window M in tokens."""
        return open_model(self.folder / "teacher").window

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The teacher's tokenizer."""
        return load_tokenizer(self.folder / "teacher")

    @cached_property
    def domains(self) -> list[str]:
        """The domains of text."""
        return sorted(path.parent.name for path in (self.folder / "corpus").glob("*/test"))

    @property
    def short_lengths(self) -> tuple[int, ...]:
        """The lengths of short text: M / 16, M / 4 and M."""
        return (self.native_window // 16, self.native_window // 4, self.native_window)

    def edges(self, factor: int) -> list[int]:
        """Return the edges of intervals of positions in windows of the student's length."""
        window = self.native_window
        return [1, window // 8, window // 2, *range(window, (factor + 1) * window, window)]

    def windows(self, domain: str, split: str, lengths, tokens: int) -> dict[int, np.ndarray]:
        """Return windows of a domain's text, by length: int64 [windows, length].

        Raises:
            UserError: there is no such text, or too little.
        """
        store = TokenStore.open(self.folder / "corpus" / domain / split)
        return cut_windows(store.read(0, len(store.tokens)), lengths, tokens)

    @cached_property
    def choices(self) -> dict[str, tuple[list[Question], list[list[Row]]]]:
        """The questions of each task, and their tokens."""
        tasks = {}
        for path in sorted((self.folder / "choices").glob("*.jsonl.gz")):
            questions = read_questions(path)[: self._questions]
            tasks[path.name.removesuffix(".jsonl.gz")] = (
                questions,
                encode(questions, self.tokenizer),
            )
        return tasks

    def retrieval(self, factor: int) -> Suite:
        """Return the samples of the retrieval tasks at M and at longer lengths."""
        lengths = [self.native_window, 2 * self.native_window, factor * self.native_window]
        filler = sentence_filler(self.tokenizer)
        samples, skipped = make_samples(
            TASKS, self.tokenizer, lengths, filler, DEPTHS, self.sizes.samples
        )
        return Suite({}, samples, skipped)

    def config(
        self,
        phases: tuple[str, ...],
        rates: tuple[float, ...],
        rope: str,
        factor: int,
        tokens: int,
        seed: int,
    ) -> Config:
        """Return the configuration of a run: a stage per phase, which share the tokens.

        Args:
            phases: names of recipes; none for the scaled student as it is.
            rates: the learning rate of each phase.
        """
        end_token = json.loads((self.folder / "corpus" / CORPUS).read_text())["end_token"]
        text = str(self.folder / "corpus" / self.domain / "train")
        settings: dict[str, object] = {
            "model.teacher": self.folder / "teacher",
            "model.compute_dtype": "bfloat16" if self.mesh.device.type == "cuda" else "float32",
            "rope.type": rope,
            "rope.factor": factor,
            "data.paths": json.dumps([text]),
            "data.eos": "yes",
            # Blocks of the student's window do not fit next to those of other runs otherwise.
            "parallel.activation_checkpointing": json.dumps(any(map(_reads_long_text, phases))),
            "run.seed": seed,
            "run.output": "unused",
        }
        if end_token is not None:
            settings["data.end_token"] = end_token
        shares = (1.0,) if len(phases) == 1 else (_FIRST_SHARE, 1 - _FIRST_SHARE)
        for phase, rate, share in zip(phases, rates, shares, strict=True):
            stage = self._stage(phase, factor)
            stage["optimizer"] |= {"learning_rate": rate, "steps": 1}
            one_step = load_config(None, [*_words(settings), f"--stages.x={json.dumps(stage)}"])
            per_step = one_step.all_stages()["x"].tokens_per_step
            stage["optimizer"]["steps"] = max(1, round(share * tokens / per_step))
            settings[f"stages.{phase}"] = json.dumps(stage)
        return load_config(None, _words(settings))

    def _stage(self, phase: str, factor: int) -> dict:
        """Return the recipe of a phase with lengths for this teacher's window."""
        stage = yaml.safe_load(recipe(phase).read_text())
        streams = stage.get("streams", {})
        for section in (stage, *streams.values()):
            data = section.get("data", {})
            if "context_length" in data:
                data["context_length"] = (
                    data["context_length"] * self.native_window // RECIPE_WINDOW
                )
        if "long" in streams:
            streams["long"]["data"] = {"context_length": factor * self.native_window}
        return stage


def _reads_long_text(phase: str) -> bool:
    return "long" in yaml.safe_load(recipe(phase).read_text()).get("streams", {})


def _words(settings: dict[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]
