"""The directory of a study: its corpus, its teacher, and the configuration of its runs."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np

from megalard.config.file import load_config
from megalard.config.schema import Config
from megalard.data.token_store import TokenStore
from megalard.data.tokenizer import load_tokenizer
from megalard.evaluation.measure import cut_windows
from megalard.evaluation.samples import sentence_filler
from megalard.evaluation.suite import Suite, make_samples
from megalard.parallel.mesh import Mesh, build_mesh
from tools.study.description import Run
from tools.study.lengths import DEPTHS, FACTOR, TASK_LENGTHS, TASKS, Sizes
from tools.study.methods import METHODS, recipe


class Study:
    """A study, with everything that its runs are measured by.

    Attributes:
        sizes: how much is measured.

    Args:
        folder: holds ``teacher/`` and ``corpus/``.
        domain: the domain of the text that students are trained on.
        device: ``auto``, ``cpu`` or ``cuda``.
        shrink: divides the tokens of every run and measurement, for a quick trial.
    """

    def __init__(self, folder: Path, domain: str, device: str, shrink: int = 1):
        self.folder, self.domain, self.device, self.shrink = folder, domain, device, shrink
        self.sizes = Sizes().divided_by(shrink)

    @cached_property
    def mesh(self) -> Mesh:
        """A mesh of this process alone."""
        return build_mesh(self.device, 1)

    @cached_property
    def domains(self) -> list[str]:
        """The domains of text. The synthetic one is left out: its tasks are measured."""
        names = {path.parent.name for path in (self.folder / "corpus").glob("*/test")}
        return sorted(names - {"synthetic"})

    def windows(self, domain: str, split: str, lengths, tokens: int) -> dict[int, np.ndarray]:
        """Return windows of a domain's text, by length: int64 [windows, length].

        Raises:
            UserError: there is no such text, or too little.
        """
        store = TokenStore.open(self.folder / "corpus" / domain / split)
        return cut_windows(store.read(0, len(store.tokens)), lengths, tokens)

    @cached_property
    def tasks(self) -> Suite:
        """The samples of all retrieval tasks."""
        tokenizer = load_tokenizer(self.folder / "teacher")
        filler = sentence_filler(tokenizer)
        samples, skipped = make_samples(
            TASKS, tokenizer, TASK_LENGTHS, filler, DEPTHS, self.sizes.samples
        )
        return Suite({}, samples, skipped)

    def config(self, run: Run, steps: int = 1) -> Config:
        """Return the configuration of a run: the recipe, the learning rate, and the paths.

        A baseline, which trains nothing, has the recipe of LinearARD.
        """
        is_gpu = self.mesh.device.type == "cuda"
        settings: dict[str, object] = {
            "model.teacher": self.folder / "teacher",
            "model.compute_dtype": "bfloat16" if is_gpu else "float32",
            "rope.type": run.rope,
            "rope.factor": FACTOR,
            "data.paths": as_list(self.folder / "corpus" / self.domain / "train"),
            "optimizer.steps": steps,
            "run.seed": run.seed,
            "run.output": "unused",
        }
        if run.rate:
            settings["optimizer.learning_rate"] = run.rate
        name = run.method if run.method in METHODS else "linearard"
        overrides = [f"--{key}={value}" for key, value in settings.items()]
        return load_config(str(recipe(name)), overrides)


def as_list(path: Path) -> str:
    """Return a list of one path as an override takes it, whatever characters the path has."""
    return json.dumps([str(path)])
