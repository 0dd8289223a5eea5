"""What each rank of a parity run does; the results are gathered to whole tensors on rank 0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megalard.checkpoint.build import load_decoder
from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.config.schema import Config
from megalard.data.batch import Batch
from megalard.data.sampler import rank_indices
from megalard.distill.student import build_student
from megalard.model.rope import rope_table, scaled_config
from megalard.model.spec import read_spec, spec_from_config
from megalard.parallel.mesh import Mesh, build_mesh
from megalard.training.export import gather_full
from megalard.training.step import Distiller
from tests.parallel.cases import ALL_CASES, STEPS, Case, batch_of, make_config, streams_of


def make_distiller(config: Config, mesh: Mesh) -> Distiller:
    """Teacher and student of a configuration, loaded as the trainer loads them."""
    spec = read_spec(config.model.teacher)
    start = read_spec(config.model.student) if config.model.student else spec
    student_spec = spec_from_config(scaled_config(start, config.rope, 64), "student")
    weights = HuggingFaceWeights(config.model.teacher)
    dtype = getattr(torch, config.model.compute_dtype)
    teacher = load_decoder(spec, rope_table(spec), mesh.tp, weights, mesh.device, dtype)
    own = HuggingFaceWeights(config.model.student) if config.model.student else None
    rope = rope_table(student_spec)
    student = build_student(teacher, student_spec, rope, config, mesh.tp, own)
    if config.trainable.mode == "lora":
        _fill_lora_b(student)
    return Distiller(teacher, student, config, mesh)


def _fill_lora_b(student) -> None:
    """B starts at zero, which would hide A's gradient; give it fixed values instead."""
    for name, parameter in student.trained.items():
        if name.endswith("lora_B"):
            layout = student.decoder.layouts[name]
            generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
            full = torch.randn(layout.full_shape, generator=generator) * 0.1
            if layout.dim is not None:
                full = full.narrow(layout.dim, layout.start, layout.length)
            parameter.data.copy_(full)


def whole(distiller: Distiller, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    layouts, axis = distiller.student.decoder.layouts, distiller.mesh.tp
    return {k: gather_full(v.detach(), layouts[k], axis).clone().cpu() for k, v in tensors.items()}


def micro_batches(case: Case, step: int, mesh: Mesh, micro_batch: int) -> dict[str, list[Batch]]:
    """This rank's micro-batches of every stream."""
    found = {}
    for name, stream in streams_of(case).items():
        every = np.arange(stream.global_batch)
        places = rank_indices(every, mesh.dp.rank, mesh.dp.size, micro_batch)
        batches = [batch_of(stream, step, place.tolist()).cut(mesh.cp) for place in places]
        found[name] = [batch.to(mesh.device) for batch in batches]
    return found


def run_case(case: Case, config: Config, mesh: Mesh) -> dict:
    """Loss, parts and gradients of the first step, weights before and after ``STEPS`` steps."""
    distiller = make_distiller(config, mesh)
    out = {"start": whole(distiller, distiller.student.trained)}
    gradients, clip = distiller.gradients, distiller.gradients.clip

    def noted(norm: torch.Tensor, largest: float) -> None:
        """What the first step found, before it is clipped."""
        if "gradients" not in out:
            out["norm"] = float(norm)
            trained = distiller.student.trained.items()
            out["gradients"] = whole(distiller, {name: p.grad for name, p in trained})
        clip(norm, largest)

    gradients.clip = noted
    for step in range(STEPS):
        batches = micro_batches(case, step, mesh, config.optimizer.micro_batch)
        result = distiller.step(batches, step)
        if step == 0:
            out["loss"], out["parts"] = result.loss, result.parts
            assert abs(result.gradient_norm - out["norm"]) <= 1e-6 * out["norm"]
    out["weights"] = whole(distiller, distiller.student.trained)
    return out


@dataclass(frozen=True)
class Run:
    """Cases on one layout (dp, cp, tp); rank 0 writes what they gave to ``file``."""

    layout: tuple[int, int, int]
    names: list[str]
    dtype: str
    file: str


def run_all(folder: str, device: str, runs: list[Run]) -> None:
    """Several runs of layouts of one size, in processes started once."""
    for run in runs:
        _, cp, tp = run.layout
        mesh, found = build_mesh(device, tp, cp), {}
        for name in run.names:
            config = make_config(ALL_CASES[name], Path(folder) / name, tp, cp, run.dtype)
            found[name] = run_case(ALL_CASES[name], config, mesh)
        if mesh.world.rank == 0:
            torch.save(found, run.file)
