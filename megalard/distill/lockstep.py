"""Teacher and student read the same blocks layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from megalard.data.batch import Batch
from megalard.distill.reach import LayerDepth, Reach
from megalard.model.decoder import Decoder
from megalard.model.layers import DecoderLayer
from megalard.model.ops import Context, Ops, Qkv


@dataclass
class LayerState:
    """The tensors of one layer of one model.

    Attributes:
        qkv: q, k and v.
        attention_output: [b, s, Hq, d]; None if it was not computed or is not kept.
        residual: the output of the layer, [t/tp, hidden]; None if it was not computed.
    """

    qkv: Qkv
    attention_output: torch.Tensor | None
    residual: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors."""
        tensors = (self.qkv.q, self.qkv.k, self.qkv.v, self.attention_output, self.residual)
        return [tensor for tensor in tensors if tensor is not None]


@dataclass
class LayerPair:
    """One layer of both models.

    Attributes:
        layer: the layer, counted from 0.
        teacher: None if no teacher is read.
    """

    layer: int
    student: LayerState
    teacher: LayerState | None


def lockstep(
    teacher: Decoder | None,
    student: Decoder,
    batch: Batch,
    dtype: torch.dtype,
    reach: Reach,
    keep_attention_output: bool,
    activation_checkpointing: bool,
) -> Iterator[LayerPair]:
    """Run both models, or the student alone, and yield the tensors of each layer.

    The teacher's tensors are freed when the consumer drops the pair.

    Args:
        dtype: dtype of the activations.
        reach: the deepest tensors that are computed.
        keep_attention_output: whether the pairs have attention outputs. If not, attention outputs
            live only as long as the backward pass needs them.
        activation_checkpointing: whether only the input of each student layer is kept.
    """
    student_context = student.context(batch.for_student())
    student_ops = student.ops.with_dropout(batch.token_ids())
    x_t, shares_embedding = None, False
    if teacher is not None:
        teacher_context = teacher.context(batch)
        x_t = teacher.embed(batch.tokens_bs, dtype).detach()
        shares_embedding = student.model.embed_tokens.weight is teacher.model.embed_tokens.weight
    x_s = x_t if shares_embedding else student.embed(batch.tokens_bs, dtype)

    for layer in range(reach.layer + 1):
        depth = LayerDepth.WHOLE if layer < reach.layer else reach.depth
        options = (depth, keep_attention_output)
        teacher_state = None
        if teacher is not None:
            with torch.no_grad(), record_function("teacher"):
                teacher_state = _run(
                    teacher.layer(layer),
                    x_t,
                    teacher_context,
                    teacher.ops,
                    *options,
                )
            x_t = teacher_state.residual
        arguments = (
            student.layer(layer),
            x_s,
            student_context,
            student_ops,
            *options,
        )
        with record_function("student"):
            if activation_checkpointing and torch.is_grad_enabled():
                student_state = checkpoint(
                    _run, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                student_state = _run(*arguments)
        student.after_layer(layer, student_state.tensors())
        x_s = student_state.residual
        yield LayerPair(layer, student_state, teacher_state)
        del student_state, teacher_state


def _run(
    layer: DecoderLayer,
    x: torch.Tensor,
    context: Context,
    ops: Ops,
    depth: LayerDepth,
    keep_attention_output: bool,
) -> LayerState:
    qkv = layer.qkv(x, context, ops)
    if depth == LayerDepth.QKV:
        return LayerState(qkv, None, None)
    attention_output = layer.attend(qkv, context, ops)
    residual = layer.rest(x, attention_output, ops) if depth == LayerDepth.WHOLE else None
    return LayerState(qkv, attention_output if keep_attention_output else None, residual)
