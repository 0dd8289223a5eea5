"""What is saved of a micro-batch until the backward pass, as the layers are computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from megalard.config.schema import ParallelConfig
from megalard.distill.objective import reaches_of
from megalard.distill.reach import LayerDepth, deepest
from megalard.distill.terms.hidden_cosine import hidden_states
from megalard.distill.terms.term import compared_layers
from megalard.estimate.buckets import Buckets
from megalard.estimate.layer import SavedLayer, saved_layer
from megalard.estimate.sizes import Sizes
from megalard.estimate.trained import Trained

ACTIVATIONS = "saved activations"
GATHERED = "gathered K and V"
RELATIONS_KIND = "relation buffers"
LOGITS = "logits"
WORKING = "tensors of one layer"
ON_THE_WAY = "gradients on the way to their sums"

Instant = Counter
"""Bytes by kind of tensor."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch on one rank, and what its layers save.

    Attributes:
        sizes: the sizes of the micro-batch.
        trained: the trained tensors.
        buckets: the gradients of those whose masters are divided.
        parallel: activation checkpointing and offloading.
        dropout: whether LoRA's inputs have dropout.
    """

    sizes: Sizes
    trained: Trained
    buckets: Buckets
    parallel: ParallelConfig
    dropout: bool

    def kept(self) -> Instant:
        """Return what all layers keep between the forward and the backward pass."""
        instant = self._saved_before(self._reach.layer + 1)
        del instant[WORKING]
        return instant

    def offloaded(self) -> list[int]:
        """Return the bytes of each tensor that offloading has in host memory after the last layer.

        What a layer saves without activation checkpointing counts as one tensor.
        """
        tensors = []
        for layer in range(self._reach.layer + 1):
            tensors += [self._saved_input(layer), *self._loss_gradients(layer)]
            if not self.parallel.activation_checkpointing:
                saved = Instant()
                add_layer(saved, self._layers[layer])
                tensors.append(saved.total())
        return [size for size in tensors if size]

    @cached_property
    def _objective(self):
        return self.sizes.stream.objective

    @cached_property
    def _reach(self):
        return deepest(reaches_of(self._objective, self.sizes.spec.num_layers))

    @cached_property
    def _layers(self) -> list[SavedLayer]:
        """What each layer saves if it is not computed again."""
        return [
            saved_layer(
                self.sizes,
                self.trained,
                layer,
                LayerDepth.WHOLE if layer < self._reach.layer else self._reach.depth,
                self.dropout,
            )
            for layer in range(self._reach.layer + 1)
        ]

    @cached_property
    def _whole_layers(self) -> int:
        return self._reach.layer + (self._reach.depth == LayerDepth.WHOLE)

    @cached_property
    def _compared(self) -> list[int]:
        """The layers whose relations or attention outputs are compared."""
        if self._objective.active_relations() or self._objective.attention_output:
            return compared_layers(self._objective, self.sizes.spec.num_layers)
        return []

    @cached_property
    def _keeps_attention_output(self) -> bool:
        return self._objective.attention_output > 0

    @property
    def _teacher(self) -> bool:
        return self._objective.needs_teacher

    def _loss_gradients(self, layer: int, has_output: bool = True) -> list[int]:
        """Return the bytes of each gradient that the losses of a layer keep from the forward pass.

        Args:
            has_output: whether to count the gradient of the layer's output.
        """
        sizes, gradients = self.sizes, []
        if layer in self._compared:
            gradients += [sizes.tokens * sizes.features(x) * sizes.element for x in sizes.operands]
            gradients += [sizes.q] * self._keeps_attention_output
        if self._objective.hidden_cosine and has_output:
            states = hidden_states(self._objective, sizes.spec.num_layers)
            gradients += [sizes.residual] * (layer + 1 in states)
        return gradients

    def _saved_input(self, layer: int) -> int:
        """Return the bytes of a layer's input as far as they are kept.

        The first layer's input needs no gradient if the embedding is frozen.
        """
        is_needed = layer or self.trained.has_embedding or self.parallel.activation_checkpointing
        return self.sizes.residual if is_needed else 0

    def _saved_before(self, layer: int) -> Instant:
        """Return what the layers before ``layer`` have saved, and the RoPE tables."""
        sizes, instant = self.sizes, Instant()
        instant[WORKING] = sizes.rope_tables * (2 if self._teacher else 1)
        first = 0
        if self.parallel.offload:
            # What one layer saves under activation checkpointing is on its way to the host or back.
            # Without it a tensor of a layer leaves or arrives while others of the layer are in use.
            first = max(0, layer - 1) if self.parallel.activation_checkpointing else layer
        for before in range(first, layer):
            instant[ACTIVATIONS] += self._saved_input(before)
            instant[RELATIONS_KIND] += sum(self._loss_gradients(before))
            if not self.parallel.activation_checkpointing:
                add_layer(instant, self._layers[before])
        return instant

    def _teacher_state(self, layer: int) -> int:
        """Return the bytes of the teacher's tensors of a layer, and of its input."""
        if not self._teacher:
            return 0
        sizes = self.sizes
        total = sizes.qkv + (sizes.q if self._keeps_attention_output else 0)
        total += sizes.residual if layer < self._whole_layers else 0
        return total + (sizes.residual if layer else 0)


def add_layer(instant: Instant, saved: SavedLayer, kind: str = ACTIVATIONS) -> None:
    """Add what a layer saves to an instant."""
    instant[kind] += saved.projections + saved.attention + saved.rest + saved.casts
    instant[GATHERED] += saved.gathered
