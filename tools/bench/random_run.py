"""A training run on a model with random weights and random tokens, without files."""

from __future__ import annotations

from functools import partial

import torch

from megalard.config.file import load_config
from megalard.config.schema import Config
from megalard.data.batch import Batch, collate
from megalard.distill.objective import is_reached
from megalard.distill.student import build_student
from megalard.model.rope import rope_table, scaled_config
from megalard.model.spec import ModelSpec, spec_from_config
from megalard.parallel.divided_weights import WeightDivision
from megalard.parallel.mesh import Mesh
from megalard.parallel.tensor.slices import check_divisible, kv_replicas
from megalard.training.step import Distiller
from tools.bench.random_model import random_decoder

_SETTINGS = {
    "model.teacher": "random",
    "rope.type": "linear",
    "rope.factor": 8,
    "trainable.lora.targets": "[q, k, v]",
    "data.paths": "random",
    "run.output": "none",
}


def make_config(settings: dict[str, object]) -> Config:
    """Return a configuration: LoRA on q, k and v, and the relations of q, k and v.

    Args:
        settings: further keys, such as ``parallel.tp``, and their values.

    Raises:
        UserError: a value is out of its range.
    """
    words = {
        key: str(value).lower() if isinstance(value, bool) else value
        for key, value in (_SETTINGS | settings).items()
    }
    return load_config(None, [f"--{key}={value}" for key, value in words.items()])


def make_distiller(config: Config, spec: ModelSpec, mesh: Mesh) -> Distiller:
    """Return teacher (if the objective needs one), scaled student and optimizer.

    The weights are random.

    Args:
        spec: the teacher, whose window is the native window.

    Raises:
        UserError: the tp ranks cannot share the model.
    """
    check_divisible(spec, mesh.tp.size)
    division = None
    if config.parallel.shard_weights:
        division = WeightDivision(mesh, kv_replicas(spec, mesh.tp.size))
    teacher = random_decoder(spec, mesh, getattr(torch, config.model.compute_dtype), division)
    student_spec = spec_from_config(scaled_config(spec, config.rope, spec.max_positions), "student")
    student = build_student(
        teacher,
        student_spec,
        rope_table(student_spec),
        mesh.tp,
        config.trainable,
        partial(is_reached, streams=config.all_streams(), num_layers=spec.num_layers),
        config.run.seed,
        division=division,
    )
    needs_teacher = any(s.objective.needs_teacher for s in config.all_streams().values())
    compared = teacher if needs_teacher else None
    del teacher  # A run frees it before masters and gradients are made.
    return Distiller(compared, student, config, mesh)


def random_batches(config: Config, spec: ModelSpec, mesh: Mesh) -> dict[str, list[Batch]]:
    """Return this rank's share of one micro-batch of random tokens; a block is one document."""
    length = config.data.context_length
    generator = torch.Generator().manual_seed(mesh.dp.rank)
    shape = (config.optimizer.micro_batch, length)
    tokens_bs = torch.randint(spec.vocab_size, shape, generator=generator)
    batch = collate([(row.numpy(), [(0, length)]) for row in tokens_bs])
    return {"main": [batch.cut(mesh.cp).to(mesh.device)]}
