"""Small students that are made and saved as the trainer does, without training them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megalard.checkpoint.companions import Companion
from megalard.checkpoint.open import open_model
from megalard.checkpoint.weights import Weights
from megalard.config.objective import ObjectiveConfig
from megalard.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    RopeConfig,
    RunConfig,
    TrainableConfig,
)
from megalard.distill.student import Student
from megalard.model.rope import scaled_config
from megalard.model.spec import spec_from_config
from megalard.parallel.mesh import Mesh
from megalard.training.export import save_student
from megalard.training.models import load_models
from megalard.training.plan import Plan
from megalard.training.stages import stages_of

NATIVE, FACTOR = 64, 4.0
TABLE = [1.0, 0.3, 0.02, 0.0005]


@dataclass(frozen=True)
class StudentCase:
    """What is trained on which model; ``rope`` table reads a file with ``TABLE`` (head_dim 8)."""

    family: str
    mode: str
    rope: str
    targets: tuple[str, ...] = ("q", "k", "v")
    compute_dtype: str = "float32"


def make_config(case: StudentCase, teacher: Path, table: Path) -> Config:
    """Return the configuration of a run of a case."""
    targets = list(case.targets)
    return Config(
        model=ModelConfig(str(teacher), compute_dtype=case.compute_dtype),
        rope=RopeConfig(case.rope, FACTOR, table=str(table) if case.rope == "table" else None),
        trainable=TrainableConfig(case.mode, LoraConfig(targets, 6, 9.0, 0.0), targets),
        # With the logits in the loss every weight is reached.
        objective=ObjectiveConfig(logits_kl=1.0),
        data=DataConfig(["unused"]),
        run=RunConfig(output="unused"),
    )


@dataclass
class MadeStudent:
    """A student with everything that saving it takes."""

    student: Student
    source: Weights
    config: dict
    mesh: Mesh
    generation_config: tuple[Companion, ...]

    def save(self, directory: Path, companions: tuple[Companion, ...] = ()) -> None:
        """Save the student as a run does."""
        files = (*companions, *self.generation_config)
        save_student(directory, self.student, self.source, self.config, files, self.mesh)


def make_student(config: Config, mesh: Mesh) -> MadeStudent:
    """Load teacher and student; every rank calls it."""
    teacher = open_model(config.model.teacher)
    scaled = scaled_config(teacher.spec, config.rope, NATIVE)
    student_spec = spec_from_config(scaled, "student")
    plan = Plan(teacher, teacher, student_spec, scaled, NATIVE, tokenizer=None)
    _, student = load_models(stages_of(config)[0], plan, mesh)
    return MadeStudent(student, teacher.weights, scaled, mesh, teacher.generation_config)


def shift(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return what "training" adds to a tensor: noise that depends on its name alone."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1009 + len(name))
    return torch.randn(shape, generator=generator) * 0.1


@torch.no_grad()
def pretend_to_train(student: Student) -> None:
    """Add to each trained tensor its ``shift``, of which a rank takes its slice."""
    for name, parameter in student.trained.items():
        held = student.decoder.slices[name]
        full = shift(name, held.full_shape)
        if held.dim is not None:
            full = full.narrow(held.dim, held.start, held.length)
        parameter.add_(full)
