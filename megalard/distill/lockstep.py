"""Teacher and student read the same block layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from megalard.data.batch import Batch
from megalard.model.decoder import Decoder, Qkv


@dataclass
class Pair:
    """What one layer hands to the objective; ``layer`` counts from 0."""

    layer: int
    student: Qkv
    teacher: Qkv


@dataclass
class Residuals:
    """The final residuals [t/tp, hidden], set once the last layer ran."""

    student: torch.Tensor | None = None
    teacher: torch.Tensor | None = None


def lockstep(
    teacher: Decoder,
    student: Decoder,
    batch: Batch,
    dtype: torch.dtype,
    last_layer: int,
    residuals: Residuals | None,
    recompute: bool,
) -> Iterator[Pair]:
    """Run both models and yield each layer's q, k and v.

    The teacher's are dropped when the consumer lets go of the pair. Of the last layer only q, k
    and v are computed, unless ``residuals`` is given to receive what follows.

    Args:
        dtype: of the activations.
        last_layer: the last layer the loss needs.
        recompute: activation checkpointing: keep each student layer's input, not its inside.
    """
    context_t, context_s = teacher.context(batch), student.context(batch)
    x_t = teacher.embed(batch.tokens_bs, dtype).detach()
    shared = student.model.embed_tokens.weight is teacher.model.embed_tokens.weight
    x_s = x_t if shared else student.embed(batch.tokens_bs, dtype)

    for layer in range(last_layer + 1):
        whole = layer < last_layer or residuals is not None
        with torch.no_grad():
            qkv_t, x_t = _run(teacher, layer, x_t, context_t, whole)
        if recompute and torch.is_grad_enabled():
            qkv_s, x_s = checkpoint(
                _run,
                student,
                layer,
                x_s,
                context_s,
                whole,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            qkv_s, x_s = _run(student, layer, x_s, context_s, whole)
        yield Pair(layer, qkv_s, qkv_t)
        del qkv_s, qkv_t
    if residuals is not None:
        residuals.student, residuals.teacher = x_s, x_t


def _run(decoder: Decoder, number: int, x, context, whole: bool):
    layer = decoder.layers[number]
    qkv = layer.qkv(x, context, decoder.ops)
    return qkv, layer.rest(x, qkv, context, decoder.ops) if whole else None
