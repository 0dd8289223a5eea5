"""The decoder: Llama and related models, driven by the flags of a ``ModelSpec``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import nn

from megalard.model.layers import LAYERS, DecoderLayer
from megalard.model.norm import RmsNorm
from megalard.model.ops import BlockBatch, Context, Ops
from megalard.model.parameter_slice import ParameterSlice
from megalard.model.projection import Projection
from megalard.model.rope import RopeTable
from megalard.model.spec import ModelSpec
from megalard.model.weight_source import WeightSource


class DecoderBody(nn.Module):
    """All of a decoder except its head; Hugging Face calls this part ``model``."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.embed_tokens = Projection(spec.hidden_size, spec.vocab_size, bias=False)
        self.layers = nn.ModuleList(LAYERS[spec.norms](spec, window) for window in spec.windows)
        self.norm = RmsNorm(spec.hidden_size, spec.norm_eps)


class Decoder(nn.Module):
    """A decoder whose parameters are this rank's slices.

    It is made without storage, on torch's meta device, and filled by ``megalard.checkpoint.build``.
    A computation gets parameters from ``layer``, ``embed``, ``final_norm``, ``head_weight`` and
    ``logits``, which ask the weight sources first.

    Attributes:
        weight_sources: what completes parameters before they are used.

    Args:
        spec: shape and flags.
        rope: the table of rotary positions.
        ops: the operations of this rank.
        slice_of: ``slice_of(name, full_shape)`` returns this rank's slice of a parameter.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rope: RopeTable,
        ops: Ops,
        slice_of: Callable[[str, tuple[int, ...]], ParameterSlice],
    ):
        super().__init__()
        self.spec, self.rope, self.ops = spec, rope, ops
        self.weight_sources: list[WeightSource] = []
        self.model = DecoderBody(spec)
        if not spec.tied_embeddings:
            self.lm_head = Projection(spec.hidden_size, spec.vocab_size, bias=False)
        self.slices: dict[str, ParameterSlice] = {
            name: slice_of(name, tuple(parameter.shape))
            for name, parameter in self.named_parameters()
        }
        self.first_vocab_row = self.slices["model.embed_tokens.weight"].start

    def layer(self, number: int) -> DecoderLayer:
        """Return a layer, counted from 0, whose parameters are complete."""
        layer = self.model.layers[number]
        self._before_use(layer)
        return cast(DecoderLayer, layer)

    @property
    def head_weight(self) -> torch.Tensor:
        """This rank's rows [vocab/tp, hidden] of the head, which may be the embedding."""
        head = self.model.embed_tokens if self.spec.tied_embeddings else self.lm_head
        self._before_use(head)
        return head.weight

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the norm between the last layer and the head."""
        self._before_use(self.model.norm)
        return self.model.norm(x)

    def context(self, batch: BlockBatch) -> Context:
        """Return what the layers need to know of a batch."""
        return Context(*self.rope.cos_sin(batch.position_bs, batch.reach_bs), batch)

    def embed(self, token_bs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the residual [t/tp, hidden] of token ids [b, s]."""
        self._before_use(self.model.embed_tokens)
        weight = self.model.embed_tokens.weight
        return self.ops.embed(token_bs.flatten(), weight, self.first_vocab_row).to(dtype)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's logits [t, vocab/tp] of the last layer's output [t/tp, hidden].

        Rows beyond the t tokens are padding, if tp does not divide t.
        """
        return self.ops.logits(self.final_norm(x), self.head_weight)

    def forward(self, batch: BlockBatch, dtype: torch.dtype) -> torch.Tensor:
        """Return the last layer's output [t/tp, hidden], before the final norm.

        Args:
            batch: the blocks to read.
            dtype: dtype of the activations.
        """
        context = self.context(batch)
        x = self.embed(batch.tokens_bs, dtype)
        for number in range(self.spec.num_layers):
            layer = self.layer(number)
            attention_output = layer.attend(layer.qkv(x, context, self.ops), context, self.ops)
            x = layer.rest(x, attention_output, self.ops)
            self.after_layer(number, [x])
        return x

    def after_layer(self, number: int, outputs: Iterable[torch.Tensor]) -> None:
        """Note what a layer has returned: all tensors through which gradients may reach it."""
        for source in self.weight_sources:
            source.after_layer(self.model.layers[number], outputs)

    def _before_use(self, module: nn.Module) -> None:
        for source in self.weight_sources:
            source.before_use(module)
