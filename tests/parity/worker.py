"""What each rank of a parity run does. Results are gathered to full tensors on rank 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megalard.checkpoint.build import load_decoder
from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.config.schema import Config
from megalard.data.batch import Batch
from megalard.data.sampler import rank_indices
from megalard.distill.objective import is_reached
from megalard.distill.student import build_student, whole_value
from megalard.model.rope import rope_table, scaled_config
from megalard.model.spec import read_spec, spec_from_config
from megalard.parallel.divided_weights import WeightDivision
from megalard.parallel.mesh import Mesh, build_mesh
from megalard.parallel.tensor.slices import kv_replicas
from megalard.training.export import gather_full
from megalard.training.step import Distiller
from tests.parity.cases import (
    ALL_CASES,
    MICRO_BATCH,
    STEPS,
    Case,
    batch_of,
    make_config,
    streams_of,
)


def make_distiller(config: Config, mesh: Mesh) -> Distiller:
    """Load teacher and student of a configuration as the trainer loads them."""
    spec = read_spec(config.model.teacher)
    start = read_spec(config.model.student) if config.model.student else spec
    student_spec = spec_from_config(scaled_config(start, config.rope, 64), "student")
    weights = HuggingFaceWeights(config.model.teacher)
    dtype = getattr(torch, config.model.compute_dtype)
    division = None
    if config.parallel.shard_weights:
        division = WeightDivision(mesh, kv_replicas(spec, mesh.tp.size))
    rope = rope_table(spec)
    teacher = load_decoder(spec, rope, mesh.tp, weights, mesh.device, dtype, division)
    start_weights = HuggingFaceWeights(config.model.student) if config.model.student else None
    student = build_student(
        teacher,
        student_spec,
        rope_table(student_spec),
        mesh.tp,
        config.trainable,
        partial(is_reached, streams=config.all_streams(), num_layers=spec.num_layers),
        config.run.seed,
        weights=start_weights,
        division=division,
    )
    if config.trainable.mode == "lora":
        _fill_lora_b(student)
    return Distiller(teacher, student, config, mesh)


def _fill_lora_b(student) -> None:
    """Give B fixed values: it starts at zero, which would make A's gradient zero."""
    for name, parameter in student.trained.items():
        if name.endswith("lora_B"):
            held = student.decoder.slices[name]
            generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
            full = torch.randn(held.full_shape, generator=generator) * 0.1
            if held.dim is not None:
                full = full.narrow(held.dim, held.start, held.length)
            parameter.data.copy_(full)


def full_tensors(
    distiller: Distiller, local: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the full tensors of the slices that ``local`` returns by name; a collective call."""
    slices, axis = distiller.student.decoder.slices, distiller.mesh.tp
    return {
        name: gather_full(local(name).detach(), slices[name], axis).clone().cpu()
        for name in distiller.student.trained
    }


def micro_batches(case: Case, step: int, mesh: Mesh, micro_batch: int) -> dict[str, list[Batch]]:
    """Return this rank's micro-batches of every stream."""
    by_stream = {}
    for name, stream in streams_of(case).items():
        samples = np.arange(stream.global_batch)
        places = rank_indices(samples, mesh.dp.rank, mesh.dp.size, micro_batch)
        batches = [batch_of(stream, step, place.tolist()).cut(mesh.cp) for place in places]
        by_stream[name] = [batch.to(mesh.device) for batch in batches]
    return by_stream


def run_case(case: Case, config: Config, mesh: Mesh, micro_batch: int) -> dict:
    """Return loss, parts and gradients of the first step, and the weights before and after."""
    distiller = make_distiller(config, mesh)
    masters, clip = distiller.masters, distiller.masters.clip
    out = {"start": full_tensors(distiller, masters.value)}

    def note_and_clip(norm: torch.Tensor, largest: float) -> None:
        """Note the gradients of the first step before they are clipped."""
        if "gradients" not in out:
            out["norm"] = float(norm)
            out["gradients"] = full_tensors(distiller, masters.gradient)
        clip(norm, largest)

    masters.clip = note_and_clip
    for step in range(STEPS):
        batches = micro_batches(case, step, mesh, micro_batch)
        result = distiller.step(batches, step)
        if step == 0:
            out["loss"], out["parts"] = result.loss, result.parts
            out["kinds"] = result.gradient_norms
            out["layers"] = {
                f"{part}.{layer}": value
                for part, row in result.layers.items()
                for layer, value in enumerate(row)
                if value is not None
            }
            assert abs(result.gradient_norm - out["norm"]) <= 1e-6 * out["norm"]
    out["weights"] = full_tensors(distiller, masters.value)
    masters.complete()
    for name, parameter in distiller.student.trained.items():
        assert torch.equal(whole_value(parameter), masters.value(name).to(parameter.dtype)), name
    return out


@dataclass(frozen=True)
class Run:
    """Cases on one layout (dp, cp, tp), whose results rank 0 writes to ``file``.

    Attributes:
        micro_batch: the blocks of a micro-batch.
    """

    layout: tuple[int, int, int]
    names: list[str]
    dtype: str
    file: str
    micro_batch: int = MICRO_BATCH


def run_all(folder: str, device: str, runs: list[Run]) -> None:
    """Run cases on several layouts with the same number of ranks, in processes started once."""
    for run in runs:
        _, cp, tp = run.layout
        mesh, results = build_mesh(device, tp, cp), {}
        for name in run.names:
            config = make_config(ALL_CASES[name], Path(folder) / name, tp, cp, run.dtype)
            results[name] = run_case(ALL_CASES[name], config, mesh, run.micro_batch)
        if mesh.world.rank == 0:
            torch.save(results, run.file)
