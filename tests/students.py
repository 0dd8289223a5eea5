"""Small students, made and saved as the trainer does, without training them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.config.schema import (
    Config,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    RopeConfig,
    TrainableConfig,
)
from megalard.distill.student import Student
from megalard.model.rope import scaled_config
from megalard.model.spec import read_spec, spec_from_config
from megalard.parallel.mesh import Mesh
from megalard.training.assemble import Plan, load_models
from megalard.training.export import save_student

NATIVE, FACTOR = 64, 4.0
TABLE = [1.0, 0.3, 0.02, 0.0005]


@dataclass(frozen=True)
class StudentCase:
    """What is trained on which model; ``rope`` table takes a file with ``TABLE`` (head_dim 8)."""

    family: str
    mode: str
    rope: str
    targets: tuple[str, ...] = ("q", "k", "v")
    compute_dtype: str = "float32"


def make_config(case: StudentCase, teacher: Path, table: Path) -> Config:
    targets = list(case.targets)
    return Config(
        model=ModelConfig(str(teacher), compute_dtype=case.compute_dtype),
        rope=RopeConfig(case.rope, FACTOR, table=str(table) if case.rope == "table" else None),
        trainable=TrainableConfig(case.mode, LoraConfig(targets, 6, 9.0, 0.0), targets),
        # with the logits in the loss every weight is reached
        objective=ObjectiveConfig(logits_kl=1.0),
    )


@dataclass
class MadeStudent:
    """A student with what is needed to save it."""

    student: Student
    source: HuggingFaceWeights
    config: dict
    mesh: Mesh

    def save(self, directory: Path, companions: tuple[Path, ...] = ()) -> None:
        save_student(directory, self.student, self.source, self.config, companions, self.mesh)


def make_student(config: Config, mesh: Mesh) -> MadeStudent:
    """Load teacher and student; every rank calls it."""
    teacher = read_spec(config.model.teacher)
    scaled = scaled_config(teacher, config.rope, NATIVE)
    plan = Plan(teacher, spec_from_config(scaled, "student"), scaled, NATIVE, tokenizer=None)
    _, student, origins = load_models(config, plan, mesh)
    return MadeStudent(student, origins.base, scaled, mesh)


def shift(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What "training" adds to a tensor: noise that its name alone decides."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1009 + len(name))
    return torch.randn(shape, generator=generator) * 0.1


@torch.no_grad()
def pretend_to_train(student: Student) -> None:
    """Add each trained tensor's ``shift``, of which a rank takes its slice."""
    for name, parameter in student.trained.items():
        layout = student.decoder.layouts[name]
        full = shift(name, layout.full_shape)
        if layout.dim is not None:
            full = full.narrow(layout.dim, layout.start, layout.length)
        parameter.add_(full)
