"""Our side of the comparison with the authors' implementation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megalard.checkpoint.build import load_decoder
from megalard.data.batch import collate
from megalard.distill.objective import is_reached
from megalard.distill.student import build_student
from megalard.model.parameter_slice import ParameterSlice
from megalard.model.rope import rope_table, scaled_config
from megalard.model.spec import spec_from_config
from megalard.parallel.mesh import Mesh
from megalard.training.step import Distiller
from tools.bench.random_model import random_config, random_spec
from tools.bench.random_run import make_config, make_distiller, random_batches
from tools.bench.step_measurement import memory_gib

# A name in SHAPES whose heads are grouped.
GROUPED = "tiny-grouped"


class StateWeights:
    """The state dict of a model of transformers; see ``megalard.checkpoint.weights.Weights``."""

    directory = Path("in memory")

    def __init__(self, state: dict[str, torch.Tensor]):
        self._state = state

    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def files(self) -> list[Path]:
        return []

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the full tensor: one process holds all of it."""
        return self._state[name].cpu()


def our_loss_and_gradients(
    state: dict[str, torch.Tensor], tokens_bs: torch.Tensor, dtype: str, mesh: Mesh
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss, and the gradients of the weights of q, k and v in fp32."""
    length = tokens_bs.shape[1]
    spec = random_spec(GROUPED, length)
    shared = spec.num_kv_heads / spec.num_heads
    config = make_config(
        {
            "model.compute_dtype": dtype,
            "trainable.mode": "weights",
            "objective.relations": f"{{q: 1.0, k: {shared}, v: {shared}}}",
            "data.context_length": length,
            "optimizer.global_batch": 1,
            "run.device": mesh.device.type,
        }
    )
    weights, torch_dtype = StateWeights(state), getattr(torch, dtype)
    teacher = load_decoder(spec, rope_table(spec), mesh.tp, weights, mesh.device, torch_dtype)
    student_spec = spec_from_config(scaled_config(spec, config.rope, length), "student")
    reached = partial(is_reached, streams=config.all_streams(), num_layers=spec.num_layers)
    table = rope_table(student_spec)
    student = build_student(
        teacher, student_spec, table, mesh.tp, config.trainable, reached, seed=0, masters=weights
    )
    distiller = Distiller(teacher, student, config, mesh)
    rows = [(row.cpu().numpy(), [(0, length)]) for row in tokens_bs]
    batches = {"main": [collate(rows).to(mesh.device)]}
    sums, counts = distiller.accumulate(batches, 0)
    gradients = {name: p.grad.clone() for name, p in student.trained.items()}
    return distiller.update(sums, counts, 0).loss, gradients


@dataclass(frozen=True)
class StepTimes:
    """The time of a micro-step and the peak memory."""

    seconds: float
    peak_gib: float | None


def step_times(step: Callable[[], object], device: torch.device, repeats: int) -> StepTimes:
    """Return the median time of a micro-step, after one micro-step to warm up."""
    times = []
    step()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        step()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return StepTimes(sorted(times)[len(times) // 2], memory_gib(device)["peak_gib"])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_micro_step(
    shape: str, tokens: int, lora_rank: int, device: str, mesh: Mesh
) -> Callable[[], object]:
    """Return a function that takes a step on one block with activation checkpointing."""
    config = make_config(
        {
            "trainable.lora.rank": lora_rank,
            "trainable.lora.alpha": 2 * lora_rank,
            "trainable.lora.dropout": 0.0,
            "data.context_length": tokens,
            "optimizer.global_batch": 1,
            "parallel.activation_checkpointing": True,
            "run.device": device,
        }
    )
    spec = spec_from_config(random_config(shape, tokens), shape)
    distiller = make_distiller(config, spec, mesh)
    batches = random_batches(config, spec, mesh)
    return lambda: distiller.step(batches, 0)
