"""The student: the teacher's weights with scaled RoPE, and what of it is trained.

Weights that teacher and student share are the same parameter object, so they exist once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megalard.checkpoint.build import empty_decoder, get_module, read_parameter, set_parameter
from megalard.checkpoint.weights import Weights
from megalard.config.schema import Config
from megalard.distill.reach import is_reached
from megalard.errors import UserError
from megalard.model.decoder import Decoder, Projection
from megalard.model.lora import Dropout, DropoutKey, initial_a
from megalard.model.rope import RopeTable
from megalard.model.spec import ModelSpec
from megalard.parallel.mesh import Axis
from megalard.parallel.tensor.layout import parameter_layout


@dataclass
class Student:
    """The student's decoder and its trained parameters.

    Attributes:
        decoder: shares the teacher's parameters wherever they are equal.
        trained: name to fp32 parameter (this rank's slice).
        dropout: what LoRA's dropout masks are drawn from.
    """

    decoder: Decoder
    trained: dict[str, nn.Parameter]
    dropout: DropoutKey


def build_student(
    teacher: Decoder,
    spec: ModelSpec,
    rope: RopeTable,
    config: Config,
    axis: Axis,
    weights: Weights | None = None,
    masters: Weights | None = None,
) -> Student:
    """Make the student of a loaded teacher.

    Args:
        teacher: the loaded teacher, whose dtype and device the frozen weights keep.
        spec, rope: the student's shape and scaled position table.
        config: which parameters are trained.
        axis: the tp axis.
        weights: the student's own checkpoint; None starts from the teacher's weights.
        masters: the files trained weights are read from, which the teacher may hold rounded to
            its compute dtype; None takes the teacher's.

    Raises:
        UserError: the student's checkpoint does not match the teacher, or nothing is trained.
    """
    decoder = empty_decoder(spec, rope, axis)
    if weights is not None:
        _check_match(teacher.spec, spec)
    place = teacher.model.embed_tokens.weight
    trained: dict[str, nn.Parameter] = {}
    for name in list(decoder.layouts):
        if _is_trained_weight(name, config, spec):
            files = weights or masters
            if files is None:
                value = get_parameter(teacher, name).detach()
            else:
                value = read_parameter(decoder, name, files)
            trained[name] = nn.Parameter(value.to(place.device, torch.float32, copy=True))
            set_parameter(decoder, name, trained[name])
        elif weights is None:
            set_parameter(decoder, name, get_parameter(teacher, name))
        else:
            value = read_parameter(decoder, name, weights).to(place.device, place.dtype)
            set_parameter(decoder, name, nn.Parameter(value, requires_grad=False))
    key = DropoutKey()
    if config.trainable.mode == "lora":
        trained |= _add_lora(decoder, spec, config, axis, key)
    if not trained:
        raise UserError("nothing is trained: no chosen weight is reached by the loss")
    return Student(decoder, trained, key)


def get_parameter(root: nn.Module, name: str) -> nn.Parameter:
    module, last = get_module(root, name)
    return getattr(module, last)


def _is_trained_weight(name: str, config: Config, spec: ModelSpec) -> bool:
    mode = config.trainable.mode
    if mode == "lora" or not is_reached(name, config, spec.num_layers):
        return False
    if mode == "all":
        return True
    return any(f".{target}_proj." in name for target in config.trainable.weights)


def _add_lora(decoder, spec, config, axis, key) -> dict[str, nn.Parameter]:
    lora, device = config.trainable.lora, decoder.model.embed_tokens.weight.device
    trained = {}
    for layer in range(spec.num_layers):
        for number, target in enumerate(("q", "k", "v", "o")):
            prefix = f"model.layers.{layer}.self_attn.{target}_proj"
            if target not in lora.targets or not is_reached(
                f"{prefix}.weight", config, spec.num_layers
            ):
                continue
            projection: Projection = decoder.get_submodule(prefix)
            out_features, in_features = decoder.layouts[f"{prefix}.weight"].full_shape
            seed = (config.run.seed * 1_000_003 + layer * 4 + number) & 0x7FFFFFFF
            full = {
                "lora_A": initial_a(lora.rank, in_features, seed),
                "lora_B": torch.zeros(out_features, lora.rank),
            }
            for kind, value in full.items():
                name = f"{prefix}.{kind}"
                layout = parameter_layout(name, tuple(value.shape), spec, axis.rank, axis.size)
                if layout.dim is not None:
                    value = value.narrow(layout.dim, layout.start, layout.length)
                parameter = nn.Parameter(value.to(device, copy=True).contiguous())
                setattr(projection, kind, parameter)
                decoder.layouts[name] = layout
                trained[name] = parameter
            projection.lora_scale = lora.alpha / lora.rank
            # q, k and v read one input and share its mask
            place = 2 * layer + (target == "o")
            projection.lora_dropout = Dropout(lora.dropout, place, key)
    return trained


def _check_match(teacher: ModelSpec, student: ModelSpec) -> None:
    for field in ("vocab_size", "num_layers", "num_heads", "num_kv_heads"):
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            raise UserError(
                f"the student's {field} is {ours} but the teacher's is {theirs}: relations compare "
                "the same layers and heads, so model.student must be of the teacher's shape"
            )
