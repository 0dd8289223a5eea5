"""The student: the teacher's weights with scaled RoPE, and which of its parameters are trained.

Weights that are equal in teacher and student are the same parameter object, so that they exist
once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from megalard.checkpoint.build import (
    empty_decoder,
    get_parameter,
    read_parameter,
    set_parameter,
)
from megalard.checkpoint.weights import Weights
from megalard.config.schema import LoraConfig, TrainableConfig
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.model.lora import Dropout, DropoutKey, initial_a
from megalard.model.names import projection_name
from megalard.model.projection import Projection
from megalard.model.rope import RopeTable
from megalard.model.spec import ModelSpec
from megalard.parallel.mesh import Axis
from megalard.parallel.tensor.layout import parameter_layout


@dataclass
class Student:
    """The student's decoder and its trained parameters.

    Attributes:
        decoder: has the teacher's parameter objects wherever the weights are equal.
        trained: name to fp32 parameter, this rank's slice.
        dropout: the seed that LoRA's dropout masks are drawn from.
    """

    decoder: Decoder
    trained: dict[str, nn.Parameter]
    dropout: DropoutKey


def build_student(
    teacher: Decoder,
    spec: ModelSpec,
    rope: RopeTable,
    axis: Axis,
    trainable: TrainableConfig,
    is_reached: Callable[[str], bool],
    seed: int,
    weights: Weights | None = None,
    masters: Weights | None = None,
) -> Student:
    """Make the student of a loaded teacher.

    Args:
        teacher: the loaded teacher, whose dtype and device the frozen weights have.
        spec, rope: the student's shape and its scaled table of positions.
        axis: the tp axis.
        trainable: which parameters are trained.
        is_reached: whether the loss depends on a parameter. Other parameters are not trained.
        seed: the seed of LoRA's initial values.
        weights: the files of a student with weights of its own; None starts from the teacher's.
        masters: the files that trained weights are read from, because the teacher may hold them
            rounded to its dtype; None takes the teacher's.

    Raises:
        UserError: the student's files do not match the teacher, or nothing is trained.
    """
    decoder = empty_decoder(spec, rope, axis)
    if weights is not None:
        _check_match(teacher.spec, spec)
    frozen = teacher.model.embed_tokens.weight
    trained: dict[str, nn.Parameter] = {}
    for name in list(decoder.layouts):
        if _is_trained_weight(name, trainable) and is_reached(name):
            files = weights or masters
            if files is None:
                value = get_parameter(teacher, name).detach()
            else:
                value = read_parameter(decoder, name, files)
            trained[name] = nn.Parameter(value.to(frozen.device, torch.float32, copy=True))
            set_parameter(decoder, name, trained[name])
        elif weights is None:
            set_parameter(decoder, name, get_parameter(teacher, name))
        else:
            value = read_parameter(decoder, name, weights).to(frozen.device, frozen.dtype)
            set_parameter(decoder, name, nn.Parameter(value, requires_grad=False))
    key = DropoutKey()
    if trainable.mode == "lora":
        trained |= _add_lora(decoder, axis, trainable.lora, is_reached, seed, key)
    if not trained:
        raise UserError(
            "nothing is trained: the loss does not depend on any of the weights that "
            "trainable chooses"
        )
    return Student(decoder, trained, key)


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
            out_features, in_features = decoder.layouts[f"{prefix}.weight"].full_shape
            pair_seed = (seed * 1_000_003 + layer * 4 + number) & 0x7FFFFFFF
            full_pair = {
                "lora_A": initial_a(lora.rank, in_features, pair_seed),
                "lora_B": torch.zeros(out_features, lora.rank),
            }
            for kind, value in full_pair.items():
                name = f"{prefix}.{kind}"
                layout = parameter_layout(name, tuple(value.shape), spec, axis.rank, axis.size)
                local = layout.cut(value).to(device, copy=True).contiguous()
                trained[name] = nn.Parameter(local)
                setattr(projection, kind, trained[name])
                decoder.layouts[name] = layout
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
    for field in ("num_layers", "num_heads", "num_kv_heads"):
        student_value, teacher_value = getattr(student, field), getattr(teacher, field)
        if student_value != teacher_value:
            raise UserError(
                f"the student's {field} is {student_value} but the teacher's is {teacher_value}: "
                "relations compare the same layers and heads, so model.student must have the "
                "teacher's shape"
            )
