"""Train a student stage by stage, in memory, so that a study can measure it in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megalard.config.schema import Config
from megalard.model.decoder import Decoder
from megalard.parallel.mesh import Mesh
from megalard.training.models import load_models, next_student
from megalard.training.monitor import peak_memory_bytes
from megalard.training.plan import make_plan
from megalard.training.stages import needs_teacher, stages_of
from megalard.training.step import Distiller, StepResult
from megalard.training.streams import make_loaders, open_streams


class Training:
    """The models of a configuration, and the steps of all of its stages.

    Attributes:
        plan, mesh: what is trained, and on which ranks.
        teacher: the frozen teacher; None if it is not kept.
        student: the student of the present stage.
        dtype: dtype of the activations.

    Args:
        folder: where text is tokenized that is not a token store.
        keeps_teacher: whether the teacher stays in memory even if no stage needs it.

    Raises:
        UserError: the configuration does not fit its models.
    """

    teacher: Decoder | None

    def __init__(self, config: Config, folder: Path, mesh: Mesh, keeps_teacher: bool = True):
        self.plan, self.mesh, self._folder = make_plan(config, mesh), mesh, folder
        self._stages = stages_of(config)
        self.teacher, self.student = load_models(self._stages[0], self.plan, mesh)
        if not keeps_teacher and not needs_teacher(self._stages):
            self.teacher = None
        self.dtype = getattr(torch, config.model.compute_dtype)

    @property
    def model(self) -> Decoder:
        """The student's present weights."""
        return self.student.decoder

    def steps(self) -> Iterator[tuple[int, StepResult, float]]:
        """Take the steps of all stages; yield the tokens read so far, the result and the seconds.

        Raises:
            UserError: the text is not there or too short.
        """
        device, tokens = self.mesh.device, 0
        stores = open_streams(self._stages, self._folder, self.plan, self.mesh)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for number, stage in enumerate(self._stages):
            if number:
                self.student = next_student(self.student, stage, self.plan, self.mesh)
            # A teacher that no later stage needs is not kept by the training.
            teacher = self.teacher if needs_teacher(self._stages[number:]) else None
            distiller = Distiller(teacher, self.student, stage.config, self.mesh)
            with make_loaders(stage, stores, self.plan, self.mesh) as loaders:
                for step in range(stage.config.optimizer.steps):
                    start = time.perf_counter()
                    result = distiller.step(loaders.step(step, device), step)
                    tokens += stage.config.tokens_per_step
                    yield tokens, result, time.perf_counter() - start

    def peak_memory(self) -> int | None:
        """Return the largest memory in use since the first step, in bytes."""
        return peak_memory_bytes(self.mesh.device)
