"""The memory that one GPU needs, by kind: the largest allocation of torch during a run.

The sums are exact arithmetic on shapes, except for the workspaces of cuBLAS, which are measured. On
all shapes that were measured, the estimate is within ``MEMORY_ERROR`` (docs/planning.md).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from megalard.config.schema import Config
from megalard.estimate.buckets import Buckets
from megalard.estimate.host import host_memory
from megalard.estimate.passes import passes
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.saved import MicroBatch
from megalard.estimate.sizes import Sizes
from megalard.estimate.trained import trained_state
from megalard.estimate.weights import parameters_of
from megalard.model.spec import ModelSpec
from megalard.model.variable_length import repeats_kv_heads

MEMORY_ERROR = 0.05
"""The largest relative difference between an estimate and a measurement."""

TEACHER = "weights of the teacher"
STUDENT = "weights of the student alone"
MASTERS = "fp32 weights that are trained"
MOMENTS = "moments of AdamW"
GRADIENTS = "gradients"
BATCH = "tokens and positions"
COPIES = "fp32 copies of gradients"
GATHERING = "weights that are being gathered"
WORKSPACES = "workspaces of cuBLAS"
LAYERS = "weights of layers that are gathered"

# cuBLAS takes 32 MiB per stream and thread on Hopper, through torch's allocator: once for the
# forward pass, and once for autograd's thread. Between steps, 64 MiB are in use in addition to the
# tensors (docs/figures/step.json).
_WORKSPACE_BYTES = 2 * 32 * 2**20


@dataclass(frozen=True)
class Memory:
    """The peak of a run on one rank.

    Attributes:
        kinds: bytes by kind of tensor at the peak.
        between_steps: bytes in use between steps.
        host: bytes in host memory by kind, of the stage that needs most.
        stage: the stage of the peak.
        stream: the stream of the peak.
        instant: what is computed at the peak.
    """

    kinds: Counter
    between_steps: int
    host: Counter
    stage: str
    stream: str
    instant: str

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.kinds.values())


def memory_of(
    config: Config, spec: ModelSpec, layout: RankLayout, repeats_kv: bool | None = None
) -> Memory:
    """Return the peak of a run: that of its largest stage.

    Args:
        config: the configuration of the run. Its sizes of tp and cp are not read.
        spec: the shape of teacher and student.
        layout: the layout of ranks.
        repeats_kv: whether attention over packed documents repeats the heads of k and v; None for
            what the installed torch does.
    """
    stages = [
        stage_memory(config, number, spec, layout, repeats_kv)
        for number in range(len(config.all_stages()))
    ]
    largest = max(stages, key=lambda memory: memory.total)
    return replace(largest, host=max((stage.host for stage in stages), key=Counter.total))


def stage_memory(
    config: Config,
    number: int,
    spec: ModelSpec,
    layout: RankLayout,
    repeats_kv: bool | None = None,
) -> Memory:
    """Return the peak of a stage, counted from 0; the arguments are those of ``memory_of``."""
    repeats_kv = repeats_kv_heads() if repeats_kv is None else repeats_kv
    name, stage = list(config.all_stages().items())[number]
    element = getattr(torch, config.model.compute_dtype).itemsize
    parameters = parameters_of(config, number, spec, layout)
    trained, parallel = parameters.trained, config.parallel
    state = trained_state(trained, parallel, element)
    sizes = {
        name: Sizes(spec, stream, layout, element, repeats_kv and stream.data.packing)
        for name, stream in stage.all_streams().items()
    }
    kinds = Counter(
        {
            TEACHER: parameters.teacher * element,
            STUDENT: parameters.student_frozen * element + state.weights,
            MASTERS: state.masters,
            MOMENTS: state.moments,
            GRADIENTS: state.gradients,
            BATCH: sum(size.batch * size.micro_batches for size in sizes.values()),
            WORKSPACES: _WORKSPACE_BYTES,
        }
    )
    micro_batches = sum(size.micro_batches for size in sizes.values())
    buckets = Buckets(trained, parallel, element, is_repeated=micro_batches > 1)
    dropout = stage.trainable.mode == "lora" and stage.trainable.lora.dropout > 0
    layers = parameters.gathered
    gathered = (layers.forward * element, layers.backward * element)
    peaks = []
    for stream, size in sizes.items():
        forward, backward = passes(size, trained, buckets, parallel, dropout)
        for instants, held in zip((forward, backward), gathered, strict=True):
            peaks += [
                (stream, name, instant + Counter({LAYERS: held})) for name, instant in instants
            ]
    kept = Counter({LAYERS: layers.between_steps * element})
    # Of all streams together:
    peaks.append(("main", "the update", kept + Counter({COPIES: buckets.updated()})))
    peaks.append(
        ("main", "the gathering of weights", kept + Counter({GATHERING: buckets.published()}))
    )
    stream, instant, tensors = max(peaks, key=lambda peak: peak[2].total())
    between_steps = kinds.total() + kept.total()
    saved = [
        MicroBatch(size, trained, buckets, parallel, dropout).offloaded() for size in sizes.values()
    ]
    host = host_memory(state, buckets, saved, parallel)
    return Memory(kinds + tensors, between_steps, host, name, stream, instant)
