"""The bytes of a micro-batch: the trainer's code on the meta device, as wide as real models."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from megalard.checkpoint.build import empty_decoder, set_parameter
from megalard.config.schema import Config
from megalard.data.batch import collate
from megalard.distill.objective import is_reached
from megalard.distill.student import build_student
from megalard.estimate.rank_layout import RankLayout
from megalard.model.decoder import Decoder
from megalard.model.rope import rope_table, scaled_config
from megalard.model.spec import ModelSpec, spec_from_config
from megalard.parallel.mesh import SINGLE, Axis, Mesh
from megalard.training.activation_offload import AHEAD, leaves_the_gpu
from megalard.training.step import Distiller
from tests.estimate.live_bytes import LiveBytes
from tools.bench.shapes import SHAPES

META = torch.device("meta")


@dataclass(frozen=True)
class MetaStep:
    """Bytes of a step of the first stream.

    Attributes:
        weights: the weights of the teacher.
        state: the masters and gradients of the trained tensors, and weights of the student alone.
        batch: the micro-batch.
        peak: what the forward and backward passes need in addition.
        update: what the sums over ranks, the update without AdamW, and the gathering of weights
            need in addition.
        after: what is in use after the step in addition.
        host: masters, moments and gradients in host memory.
        offloaded: the bytes of each tensor of the last micro-batch that was saved in host memory.
    """

    weights: int
    state: int
    batch: int
    peak: int
    update: int
    after: int
    host: int
    offloaded: list[int]


def shape(name: str, layers: int, window: int, **changes) -> ModelSpec:
    """Return a model of a known width with few layers."""
    content = {
        "model_type": "llama",
        **SHAPES[name],
        "num_hidden_layers": layers,
        "max_position_embeddings": window,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return spec_from_config(content | changes, name)


def mesh_of(layout: RankLayout) -> Mesh:
    """Return rank 0 of a mesh whose collectives are stand-ins."""
    world, dp, cp, data, tp = (
        SINGLE if size == 1 else Axis(None, 0, size)
        for size in (layout.ranks, layout.dp, layout.cp, layout.data, layout.tp)
    )
    return Mesh(world, dp, cp, data, tp, META)


def run_step(config: Config, spec: ModelSpec, layout: RankLayout) -> MetaStep:
    """Run the forward and backward pass of one micro-batch; a block is one document."""
    mesh, live = mesh_of(layout), LiveBytes("meta")
    dtype = getattr(torch, config.model.compute_dtype)
    ((_, stream),) = config.all_streams().items()
    with live:
        teacher = _decoder(spec, mesh, dtype)
        weights = live.now
        student_spec = spec_from_config(scaled_config(spec, config.rope, spec.max_positions), "s")
        student = build_student(
            teacher,
            student_spec,
            rope_table(student_spec),
            mesh.tp,
            config.trainable,
            partial(is_reached, streams=config.all_streams(), num_layers=spec.num_layers),
            0,
        )
        distiller = Distiller(teacher, student, config, mesh)
        state = live.now - weights
        length = stream.data.context_length
        tokens = np.zeros(length, dtype=np.int64)
        blocks = [(tokens, [(0, length)]) for _ in range(stream.micro_batch)]
        batch = collate(blocks).cut(mesh.cp).to(META)
        before = live.peak = live.now
        objective = distiller.objectives["main"]
        scale = torch.empty(len(objective.terms), device=META)
        reads = teacher if stream.objective.needs_teacher else None
        for _ in range(stream.global_batch // (stream.micro_batch * layout.dp)):
            on_host = _OnHost()
            with on_host.hooks() if config.parallel.offload else torch.enable_grad():
                loss, _ = objective(reads, student.decoder, batch, scale)
            loss.backward()
            distiller.masters.end_backward()
            offloaded = on_host.sizes
            del loss, on_host
        peak, live.peak = live.peak - before, live.now
        _update(distiller, config)
    host_copies = sum(
        bucket._host_gradient.nbytes
        for bucket in distiller.masters._sharded.buckets
        if bucket._host_gradient is not None
    )
    return MetaStep(
        weights,
        state,
        before - weights - state,
        peak,
        live.peak - before,
        live.now - before,
        # The optimizer is a stand-in; its two moments are as large as the masters.
        sum(3 * x.nbytes for x in distiller.masters.parameters if x.device != META) + host_copies,
        offloaded,
    )


def _update(distiller: Distiller, config: Config) -> None:
    """Do what ``Distiller.update`` does with masters and gradients."""
    masters = distiller.masters
    masters.reduce()
    masters.clip(masters.norm(), config.optimizer.clip)
    masters.give_gradients()
    masters.take_back_gradients()
    masters.publish()
    masters.complete()


def _decoder(spec: ModelSpec, mesh: Mesh, dtype: torch.dtype) -> Decoder:
    decoder = empty_decoder(spec, rope_table(spec), mesh.tp)
    for name, held in decoder.slices.items():
        value = torch.empty(held.local_shape, dtype=dtype, device=META)
        set_parameter(decoder, name, torch.nn.Parameter(value, requires_grad=False))
    return decoder


class _OnHost:
    """Keep on the device what ``ActivationOffload`` keeps there: tensors that leave and arrive."""

    def __init__(self):
        self._leaving: deque[torch.Tensor] = deque(maxlen=AHEAD)
        self._fetched: dict[int, torch.Tensor] = {}
        self._saved: list[tuple] = []
        self._unread = 0

    @property
    def sizes(self) -> list[int]:
        """The bytes of each tensor that has left the device."""
        return [shape.numel() * dtype.itemsize for shape, _, dtype in self._saved]

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | int:
        if tensor.device != META or not leaves_the_gpu(tensor):
            return tensor
        self._leaving.append(tensor)
        self._saved.append((tensor.shape, tensor.stride(), tensor.dtype))
        self._unread = len(self._saved)
        return self._unread - 1

    def _unpack(self, kept: torch.Tensor | int) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        self._leaving.clear()
        unread = self._unread = min(self._unread, kept)
        for place in {kept, *range(max(0, kept - AHEAD), unread)} - self._fetched.keys():
            shape, strides, dtype = self._saved[place]
            self._fetched[place] = torch.empty_strided(shape, strides, dtype=dtype, device=META)
        return self._fetched.pop(kept)
