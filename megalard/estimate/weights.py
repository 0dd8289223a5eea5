"""The parameters of one rank: what is frozen, what is trained, and the bytes of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

from megalard.checkpoint.build import empty_decoder
from megalard.config.schema import Config, TrainableConfig
from megalard.distill.objective import reaches_of
from megalard.distill.student import changed_weights
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.sizes import FP32_BYTES
from megalard.model.names import ParameterName, projection_name
from megalard.model.rope import RopeTable, rope_table
from megalard.model.spec import ModelSpec
from megalard.parallel.tensor.layout import parameter_layout


@dataclass(frozen=True)
class Trained:
    """The trained tensors of a stage on one rank.

    Attributes:
        sizes: name to number of elements.
        rank: the rank of LoRA pairs; 0 if there are none.
        is_gathered: whether the tensors exist in the compute dtype between steps, so that nothing
            is cast where it is used.
    """

    sizes: Mapping[str, int]
    rank: int
    is_gathered: bool = False

    @cached_property
    def elements(self) -> int:
        """The number of elements of all tensors."""
        return sum(self.sizes.values())

    @property
    def has_embedding(self) -> bool:
        """Whether the embedding is trained."""
        return "embed_tokens" in self.outside_layers()

    def in_layer(self, layer: int) -> Mapping[str, int]:
        """Return the trained weights of a layer: module to number of elements."""
        return self._weights.get(layer, {})

    def lora_in_layer(self, layer: int) -> list[str]:
        """Return the modules of a layer that have a LoRA pair."""
        return [p.module for p, _ in self._parsed if p.layer == layer and p.kind == "lora_A"]

    def outside_layers(self) -> Mapping[str, int]:
        """Return the trained weights of the embedding, the final norm and the head."""
        return self._weights.get(None, {})

    @cached_property
    def _parsed(self) -> list[tuple[ParameterName, int]]:
        return [(ParameterName.parse(name), size) for name, size in self.sizes.items()]

    @cached_property
    def _weights(self) -> dict[int | None, dict[str, int]]:
        weights: dict[int | None, dict[str, int]] = {}
        for parsed, size in self._parsed:
            if parsed.kind == "weight":
                weights.setdefault(parsed.layer, {})[parsed.module] = size
        return weights


@dataclass(frozen=True)
class Parameters:
    """The parameters of teacher and student on one rank, in elements.

    Attributes:
        all_weights: the weights of one model, without LoRA pairs.
        teacher: the elements of the teacher; 0 if no stage from this one on needs it.
        student_frozen: the elements of the student's frozen weights that are not the teacher's.
        trained: the trained tensors.
    """

    all_weights: Mapping[str, int]
    teacher: int
    student_frozen: int
    trained: Trained


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
    frozen = set(weights) - set(trained.sizes)
    # What the student does not have as the teacher's parameter objects.
    separate = frozen if config.model.student else frozen & _changed(stages[:number], weights, spec)
    if not has_teacher:
        separate = frozen
    return Parameters(
        weights,
        sum(weights.values()) if has_teacher else 0,
        sum(weights[name] for name in separate),
        trained,
    )


@cache
def _rope(spec: ModelSpec) -> RopeTable:
    return rope_table(spec)


def weights_of(spec: ModelSpec, layout: RankLayout) -> Mapping[str, int]:
    """Return the number of elements of each weight on one rank, by name."""
    return _weights_over(spec, layout.tp)


@cache
def _weights_over(spec: ModelSpec, tp: int) -> Mapping[str, int]:
    layouts = empty_decoder(spec, _rope(spec), RankLayout(tp=tp).tp_axis).layouts
    return {name: prod(layout.local_shape) for name, layout in layouts.items()}


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
    weights = weights_of(spec, layout)
    if stage.trainable.mode != "lora":
        names = changed_weights(weights, stage.trainable, reached)
        return Trained({name: weights[name] for name in weights if name in names}, 0)
    return Trained(_lora_pairs(stage.trainable, spec, layout, reached), stage.trainable.lora.rank)


def _lora_pairs(trainable: TrainableConfig, spec: ModelSpec, layout: RankLayout, reached):
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
        for target in trainable.lora.targets:
            prefix = projection_name(layer, target)
            if not reached(f"{prefix}.weight"):
                continue
            out_features, in_features = shapes[target]
            for kind, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
                name = f"{prefix}.{kind}"
                local = parameter_layout(name, shape, spec, 0, layout.tp).local_shape
                pairs[name] = prod(local)
    return pairs


def _changed(earlier: list[Config], names: Mapping[str, int], spec: ModelSpec) -> set[str]:
    """Return the weights that earlier stages changed."""
    changed: set[str] = set()
    for stage in earlier:
        changed |= changed_weights(names, stage.trainable, _reached(stage, spec))
    return changed


@dataclass(frozen=True)
class TrainedState:
    """Bytes of what belongs to the trained tensors of one rank between steps.

    Attributes:
        gathered: the weights in the compute dtype, if the masters are divided over data ranks.
        masters: fp32 weights.
        moments: AdamW's two fp32 moments.
        gradients: fp32 gradients.
    """

    gathered: int
    masters: int
    moments: int
    gradients: int


def trained_state(elements: int, element: int, data_ranks_sharing_state: int) -> TrainedState:
    """Return the bytes of masters, moments and gradients of trained tensors on one rank.

    Args:
        elements: the number of elements of the trained tensors.
        element: bytes of an element in the compute dtype.
        data_ranks_sharing_state: over how many data-parallel ranks masters, moments and reduced
            gradients are divided. With 1 every rank has all of them, and the masters are cast to
            the compute dtype where they are used.
    """
    share = -(-elements // data_ranks_sharing_state)
    return TrainedState(
        gathered=element * elements if data_ranks_sharing_state > 1 else 0,
        masters=FP32_BYTES * share,
        moments=2 * FP32_BYTES * share,
        gradients=FP32_BYTES * share,
    )
