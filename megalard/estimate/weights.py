"""The parameters of one rank: what is frozen and what is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

from megalard.checkpoint.build import empty_decoder
from megalard.config.schema import Config, ParallelConfig, TrainableConfig
from megalard.distill.objective import reaches_of
from megalard.distill.student import changed_weights
from megalard.estimate.gathered_layers import (
    GatheredLayers,
    gathered_layers,
    has_rows_of,
    kept_elements,
)
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.trained import Trained, TrainedTensor
from megalard.model.names import projection_name
from megalard.model.parameter_slice import ParameterSlice
from megalard.model.rope import RopeTable, rope_table
from megalard.model.spec import ModelSpec
from megalard.parallel.tensor.slices import slice_of_parameter


@dataclass(frozen=True)
class Parameters:
    """The parameters of teacher and student on one rank, in elements.

    Attributes:
        all_weights: the weights of one model, without LoRA pairs.
        teacher: the elements that are kept of the teacher; 0 if no stage from this one on needs it.
        student_frozen: those of the student's frozen weights that are not the teacher's.
        trained: the trained tensors.
        gathered: the divided weights of one layer, while they are gathered.
    """

    all_weights: Mapping[str, int]
    teacher: int
    student_frozen: int
    trained: Trained
    gathered: GatheredLayers


def parameters_of(config: Config, number: int, spec: ModelSpec, layout: RankLayout) -> Parameters:
    """Return what a rank holds during a stage.

    Args:
        config: the run.
        number: the number of the stage, counted from 0.
        spec: the shape of the model.
        layout: the layout of ranks.
    """
    stages = list(config.all_stages().values())
    weights = weights_of(spec, layout)
    trained = trained_of(stages[number], spec, layout)
    has_teacher = any(
        stream.objective.needs_teacher
        for stage in stages[number:]
        for stream in stage.all_streams().values()
    )
    frozen = set(weights) - set(trained.tensors)
    # What the student does not have as the teacher's parameter objects.
    separate = frozen if config.model.student else frozen & _changed(stages[:number], weights, spec)
    if not has_teacher:
        separate = frozen
    slices = slices_over(spec, layout.tp)
    kept = kept_elements(slices, config.parallel, layout)
    of_student = separate.union(trained.tensors)
    return Parameters(
        weights,
        sum(kept.values()) if has_teacher else 0,
        sum(kept[name] for name in separate),
        trained,
        gathered_layers(slices, config.parallel, layout, of_student, has_teacher),
    )


@cache
def _rope(spec: ModelSpec) -> RopeTable:
    return rope_table(spec)


def weights_of(spec: ModelSpec, layout: RankLayout) -> Mapping[str, int]:
    """Return the number of elements of each weight on one rank, by name."""
    slices = slices_over(spec, layout.tp)
    return {name: prod(held.local_shape) for name, held in slices.items()}


@cache
def slices_over(spec: ModelSpec, tp: int) -> Mapping[str, ParameterSlice]:
    """Return the slice of each weight on the first of ``tp`` ranks, in the order of the model."""
    return empty_decoder(spec, _rope(spec), RankLayout(tp=tp).tp_axis).slices


def _reached(stage: Config, spec: ModelSpec) -> Callable[[str], bool]:
    """Return whether the loss of any stream of a stage depends on a parameter."""
    reaches = [
        reach
        for stream in stage.all_streams().values()
        for reach in reaches_of(stream.objective, spec.num_layers)
    ]
    return lambda name: any(reach.includes(name) for reach in reaches)


def trained_of(stage: Config, spec: ModelSpec, layout: RankLayout) -> Trained:
    """Return the trained tensors of a stage on one rank."""
    reached = _reached(stage, spec)
    if stage.trainable.mode == "lora":
        slices = _lora_pairs(stage.trainable, spec, layout, reached)
    else:
        weights = slices_over(spec, layout.tp)
        names = changed_weights(weights, stage.trainable, reached)
        slices = {name: weights[name] for name in weights if name in names}
    tensors = {
        name: _trained_tensor(name, held, stage.parallel, layout) for name, held in slices.items()
    }
    return Trained(tensors, stage.trainable.lora.rank if stage.trainable.mode == "lora" else 0)


def _trained_tensor(
    name: str, held: ParameterSlice, parallel: ParallelConfig, layout: RankLayout
) -> TrainedTensor:
    holders = layout.data * held.replicas
    is_divided = parallel.offload_optimizer or (parallel.shard_optimizer and holders > 1)
    has_rows = has_rows_of(name, held, parallel, layout)
    return TrainedTensor(held.local_shape, holders, is_divided, has_rows)


def _lora_pairs(
    trainable: TrainableConfig,
    spec: ModelSpec,
    layout: RankLayout,
    reached: Callable[[str], bool],
) -> dict[str, ParameterSlice]:
    """Return the slices of the LoRA pairs on the first tp rank, in the order of the model."""
    q_features, kv_features = (
        heads * spec.head_dim for heads in (spec.num_heads, spec.num_kv_heads)
    )
    shapes = {
        "q": (q_features, spec.hidden_size),
        "k": (kv_features, spec.hidden_size),
        "v": (kv_features, spec.hidden_size),
        "o": (spec.hidden_size, q_features),
    }
    rank, pairs = trainable.lora.rank, {}
    for layer in range(spec.num_layers):
        for target, (out_features, in_features) in shapes.items():
            prefix = projection_name(layer, target)
            if target not in trainable.lora.targets or not reached(f"{prefix}.weight"):
                continue
            for kind, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
                name = f"{prefix}.{kind}"
                pairs[name] = slice_of_parameter(name, shape, spec, 0, layout.tp)
    return pairs


def _changed(earlier: list[Config], names: Mapping[str, int], spec: ModelSpec) -> set[str]:
    """Return the weights that earlier stages changed."""
    changed: set[str] = set()
    for stage in earlier:
        changed |= changed_weights(names, stage.trainable, _reached(stage, spec))
    return changed
