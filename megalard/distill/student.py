"""The student: the teacher's weights with scaled RoPE, and which of its parameters are trained.

Weights that are equal in teacher and student are the same parameter object, so that they exist
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import nn

from megalard.checkpoint.build import (
    empty_decoder,
    get_parameter,
    make_parameter,
    read_parameter,
    set_parameter,
)
from megalard.checkpoint.weights import Weights, merge_lora
from megalard.config.schema import LoraConfig, TrainableConfig
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.model.lora import Dropout, DropoutKey, initial_a
from megalard.model.names import projection_name
from megalard.model.projection import Projection
from megalard.model.rope import RopeTable
from megalard.model.spec import ModelSpec
from megalard.parallel.divided_weights import DividedParameter, LayerGathers, WeightDivision
from megalard.parallel.mesh import Axis
from megalard.parallel.tensor.slices import slice_of_parameter


class MasterValues(Protocol):
    """The fp32 values of trained parameters that the decoder has rounded."""

    def value(self, name: str) -> torch.Tensor:
        """Return the fp32 value of a trained parameter, this rank's slice; a collective call."""
        ...

    def complete(self) -> None:
        """Complete the decoder's parameters for what reads them elsewhere; a collective call."""
        ...


@dataclass
class Student:
    """The student's decoder and its trained parameters.

    Attributes:
        decoder: has the teacher's parameter objects wherever the weights are equal.
        trained: name to parameter, this rank's slice. It is fp32, or in the compute dtype where
            ``masters`` has the fp32 value.
        carried: name to fp32 weight, this rank's slice in host memory: what earlier stages changed
            and this stage does not train. The decoder has it rounded to its dtype.
        dropout: the seed that LoRA's dropout masks are drawn from.
        masters: the fp32 values of ``trained``; None while ``trained`` has them.
    """

    decoder: Decoder
    trained: dict[str, nn.Parameter]
    dropout: DropoutKey
    carried: dict[str, torch.Tensor] = field(default_factory=dict)
    masters: MasterValues | None = None

    @property
    def changed(self) -> list[str]:
        """The names of what the student has besides the model that it started from."""
        return [*self.carried, *self.trained]

    def value(self, name: str) -> torch.Tensor:
        """Return the fp32 value of what is called ``name`` in ``changed``, this rank's slice.

        This is a collective call of all ranks, because they may have divided the value.
        """
        if name in self.carried:
            return self.carried[name]
        return self.masters.value(name) if self.masters else whole_value(self.trained[name])

    def complete(self) -> None:
        """Complete all parameters of the decoder; a collective call.

        The decoder completes what it uses itself. Only what reads its parameters elsewhere needs
        this call, and what ends the ranks while weights may be on their way.
        """
        if self.masters is not None:
            self.masters.complete()

    def release(self) -> None:
        """Free the memory of everything that is trained; a collective call.

        The student cannot be used any more.
        """
        self.complete()
        self.masters = None
        self.decoder.weight_sources.clear()
        for parameter in self.decoder.parameters():
            if isinstance(parameter, DividedParameter):
                parameter.free()
        for parameter in self.trained.values():
            parameter.grad = None
            if isinstance(parameter, DividedParameter):
                parameter.release()
            parameter.data = parameter.detach().new_empty(0)

    def use_carried(self) -> None:
        """Copy the carried weights into the decoder, after they were loaded."""
        for name, value in self.carried.items():
            parameter = get_parameter(self.decoder, name)
            if isinstance(parameter, DividedParameter):
                parameter.write(parameter.local_part(value))
            else:
                parameter.data.copy_(value)


def build_student(
    start: Decoder,
    spec: ModelSpec,
    rope: RopeTable,
    axis: Axis,
    trainable: TrainableConfig,
    is_reached: Callable[[str], bool],
    seed: int,
    weights: Weights | None = None,
    masters: Weights | None = None,
    earlier: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    division: WeightDivision | None = None,
) -> Student:
    """Make a student that starts from a loaded decoder.

    Args:
        start: the teacher or, after an earlier stage, that stage's student. Its frozen parameters
            are shared.
        spec, rope: the student's shape, and its table of scaled RoPE angles.
        axis: the tp axis.
        trainable: which parameters are trained.
        is_reached: whether the loss depends on a parameter. Other parameters are not trained.
        seed: the seed of LoRA's initial values.
        weights: the files of a student that has other weights than the teacher; None takes the
            weights of ``start``.
        masters: the files that trained weights are read from, because ``start`` may hold them
            rounded to its dtype; None takes the trained weights of ``start`` too.
        earlier: fp32 weights that earlier stages changed, this rank's slices.
        dtype: dtype of the frozen weights; None takes that of the embedding of ``start``.
        division: which weights the ranks divide; None keeps this rank's slices whole.

    Raises:
        UserError: the student's files do not match ``start``, or nothing is trained.
    """
    decoder = empty_decoder(spec, rope, axis)
    if weights is not None:
        _check_match(start.spec, spec)
    embedding, earlier = start.model.embed_tokens.weight, earlier or {}
    device, dtype = embedding.device, dtype or embedding.dtype
    trained: dict[str, nn.Parameter] = {}
    carried: dict[str, torch.Tensor] = {}
    for name in list(decoder.slices):
        if _is_trained_weight(name, trainable) and is_reached(name):
            files = weights or masters
            if name in earlier:
                value = earlier[name]
            elif files is None:
                value = whole_value(get_parameter(start, name))
            else:
                value = read_parameter(decoder, name, files)
            trained[name] = make_parameter(decoder, name, value, device, dtype, division, True)
            set_parameter(decoder, name, trained[name])
            continue
        if name in earlier:
            value = carried[name] = earlier[name].to("cpu", torch.float32)
        elif weights is None:
            set_parameter(decoder, name, get_parameter(start, name))
            continue
        else:
            value = read_parameter(decoder, name, weights)
        frozen = make_parameter(decoder, name, value, device, dtype, division)
        set_parameter(decoder, name, frozen)
    if division is not None:
        decoder.weight_sources.append(LayerGathers(decoder))
    key = DropoutKey()
    if trainable.mode == "lora":
        trained |= _add_lora(decoder, axis, trainable.lora, is_reached, seed, key)
    if not trained:
        raise UserError(
            "nothing is trained: the loss does not depend on any of the weights that "
            "trainable chooses"
        )
    return Student(decoder, trained, key, carried)


def whole_value(parameter: nn.Parameter) -> torch.Tensor:
    """Return the value of a parameter, this rank's slice; of a divided one by a collective call."""
    if isinstance(parameter, DividedParameter):
        return parameter.value()
    return parameter.detach()


def changed_weights(
    names: Iterable[str], trainable: TrainableConfig, is_reached: Callable[[str], bool]
) -> set[str]:
    """Return the weights that a stage changes: those it trains or adds LoRA pairs to."""
    if trainable.mode == "lora":
        ends = tuple(f"self_attn.{target}_proj.weight" for target in trainable.lora.targets)
        return {name for name in names if name.endswith(ends) and is_reached(name)}
    return {name for name in names if _is_trained_weight(name, trainable) and is_reached(name)}


def merged_weights(student: Student, masters: Weights) -> dict[str, torch.Tensor]:
    """Return what a finished stage leaves: fp32 weights by name, this rank's slices.

    LoRA pairs are merged. The weights are in host memory, because the GPU may not have room for the
    finished stage and the next one. This is a collective call of all ranks.

    Args:
        student: the student of the stage.
        masters: the files that the weights came from.
    """
    decoder = student.decoder
    merged: dict[str, torch.Tensor] = dict(student.carried)
    for name in student.trained:
        stem, _, kind = name.rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            merged[name] = student.value(name).cpu()
        elif kind == "lora_A":
            weight = f"{stem}.weight"
            value = merged.get(weight)
            if value is None:
                value = read_parameter(decoder, weight, masters)
            lora_a, lora_b = student.value(name), student.value(f"{stem}.lora_B")
            scale = cast(Projection, decoder.get_submodule(stem)).lora_scale
            value = value.to(lora_a.device, torch.float32, copy=True)
            merged[weight] = merge_lora(weight, value, lora_a, lora_b, scale).cpu()
    return merged


def _is_trained_weight(name: str, trainable: TrainableConfig) -> bool:
    if trainable.mode == "weights":
        return any(f".{target}_proj." in name for target in trainable.weights)
    return trainable.mode == "all"


def _add_lora(
    decoder: Decoder,
    axis: Axis,
    lora: LoraConfig,
    is_reached: Callable[[str], bool],
    seed: int,
    key: DropoutKey,
) -> dict[str, nn.Parameter]:
    """Give projections their LoRA pairs, and return the pairs."""
    spec, device = decoder.spec, decoder.model.embed_tokens.weight.device
    trained: dict[str, nn.Parameter] = {}
    for layer in range(spec.num_layers):
        for number, target in enumerate(("q", "k", "v", "o")):
            prefix = projection_name(layer, target)
            if target not in lora.targets or not is_reached(f"{prefix}.weight"):
                continue
            projection = cast(Projection, decoder.get_submodule(prefix))
            out_features, in_features = decoder.slices[f"{prefix}.weight"].full_shape
            pair_seed = (seed * 1_000_003 + layer * 4 + number) & 0x7FFFFFFF
            full_pair = {
                "lora_A": initial_a(lora.rank, in_features, pair_seed),
                "lora_B": torch.zeros(out_features, lora.rank),
            }
            for kind, value in full_pair.items():
                name = f"{prefix}.{kind}"
                held = slice_of_parameter(name, tuple(value.shape), spec, axis.rank, axis.size)
                local = held.cut(value).to(device, copy=True).contiguous()
                trained[name] = nn.Parameter(local)
                setattr(projection, kind, trained[name])
                decoder.slices[name] = held
            projection.lora_scale = lora.alpha / lora.rank
            # q, k and v read the same input and share its dropout mask.
            place = 2 * layer + (target == "o")
            projection.lora_dropout = Dropout(lora.dropout, place, key)
    return trained


def _check_match(teacher: ModelSpec, student: ModelSpec) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"the student's vocabulary has {student.vocab_size} entries but the teacher's "
            f"{teacher.vocab_size}: resize the student's embedding with transformers "
            f"(model.resize_token_embeddings({teacher.vocab_size})) and save it again"
        )
    for name in ("num_layers", "num_heads", "num_kv_heads"):
        student_value, teacher_value = getattr(student, name), getattr(teacher, name)
        if student_value != teacher_value:
            raise UserError(
                f"the student's {name} is {student_value} but the teacher's is {teacher_value}: "
                "relations compare the same layers and heads, so model.student must have the "
                "teacher's shape"
            )
