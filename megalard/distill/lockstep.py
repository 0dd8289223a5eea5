"""Teacher and student read the same block layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from megalard.data.batch import Batch
from megalard.distill.reach import Reach, Stage
from megalard.model.decoder import Decoder, DecoderLayer, Qkv
from megalard.parallel.tensor.linear import TensorParallel


@dataclass
class LayerState:
    """What a model has of one layer.

    ``mixed`` is the attention output A V [b, s, Hq, d] and ``residual`` the layer's output
    [t/tp, hidden]; None where it was not asked for or not computed.
    """

    qkv: Qkv
    mixed: torch.Tensor | None
    residual: torch.Tensor | None


@dataclass
class Pair:
    """One layer of both models, counted from 0; ``teacher`` is None where there is none."""

    layer: int
    student: LayerState
    teacher: LayerState | None


def lockstep(
    teacher: Decoder | None,
    student: Decoder,
    batch: Batch,
    dtype: torch.dtype,
    reach: Reach,
    with_mixed: bool,
    recompute: bool,
) -> Iterator[Pair]:
    """Run both models, or the student alone, and yield each layer's states.

    The teacher's are dropped when the consumer lets go of the pair. Of the last layer only what
    ``reach`` says is computed.

    Args:
        dtype: of the activations.
        with_mixed: keep A V; otherwise it is not kept beside what the backward pass needs.
        recompute: activation checkpointing: keep each student layer's input, not its inside.
    """
    context_s, x_t = student.context(batch.for_student()), None
    ops_s = TensorParallel(student.ops.axis, batch.token_ids())
    shared = False
    if teacher is not None:
        context_t = teacher.context(batch)
        x_t = teacher.embed(batch.tokens_bs, dtype).detach()
        shared = student.model.embed_tokens.weight is teacher.model.embed_tokens.weight
    x_s = x_t if shared else student.embed(batch.tokens_bs, dtype)

    for layer in range(reach.layer + 1):
        stage = Stage.WHOLE if layer < reach.layer else reach.stage
        state_t = None
        if teacher is not None:
            with torch.no_grad(), record_function("teacher"):
                work = (teacher.layers[layer], x_t, context_t, teacher.ops)
                state_t = _run(*work, stage, with_mixed)
            x_t = state_t.residual
        work = (student.layers[layer], x_s, context_s, ops_s)
        with record_function("student"):
            if recompute and torch.is_grad_enabled():
                state_s = checkpoint(
                    _run, *work, stage, with_mixed, use_reentrant=False, preserve_rng_state=False
                )
            else:
                state_s = _run(*work, stage, with_mixed)
        x_s = state_s.residual
        yield Pair(layer, state_s, state_t)
        del state_s, state_t


def _run(layer: DecoderLayer, x, context, ops, stage: Stage, with_mixed: bool) -> LayerState:
    qkv = layer.qkv(x, context, ops)
    if stage == Stage.QKV:
        return LayerState(qkv, None, None)
    mixed = layer.self_attn.mix(qkv, context)
    residual = layer.rest(x, mixed, ops) if stage == Stage.WHOLE else None
    return LayerState(qkv, mixed if with_mixed else None, residual)
