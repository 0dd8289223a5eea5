"""The peak of a micro-batch's forward and backward pass, as the largest of a few instants.

An *instant* is a place in the step with all tensors that live there. Which of them is the peak
depends on the shape, the objective, the layout and the settings, so all of them are computed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from megalard.config.objective import RELATIONS
from megalard.config.schema import ParallelConfig
from megalard.distill.objective import reaches_of
from megalard.distill.reach import LayerDepth, deepest
from megalard.distill.terms.hidden_cosine import hidden_states
from megalard.distill.terms.row_slices import ROWS
from megalard.distill.terms.term import compared_layers
from megalard.estimate.layer import SavedLayer, saved_layer
from megalard.estimate.sizes import FP32_BYTES, Sizes
from megalard.estimate.weights import Trained

ACTIVATIONS = "saved activations"
GATHERED = "gathered K and V"
RELATIONS_KIND = "relation buffers"
LOGITS = "logits"
WORKING = "tensors of one layer"

_INT64_BYTES = 8

Instant = Counter
"""Bytes by kind of tensor."""


@dataclass(frozen=True)
class Passes:
    """The forward and backward pass of one micro-batch on one rank.

    Attributes:
        sizes: the sizes of the micro-batch.
        trained: the trained tensors.
        parallel: activation checkpointing and offloading.
        dropout: whether LoRA's inputs have dropout.
    """

    sizes: Sizes
    trained: Trained
    parallel: ParallelConfig
    dropout: bool

    def peak(self) -> tuple[str, Instant]:
        """Return the name and the bytes of the instant at which most memory is in use."""
        instants = {
            "LoRA's dropout in the last layer": self._dropout(),
            "the relations of the last layer": self._relations(),
            "the attention outputs of the last layer": self._attention_outputs(),
            "the hidden states": self._hidden_states(),
            "the MLP of the last layer": self._forward_mlp(),
            "the backward pass of the last layer's MLP": self._backward_mlp(),
            "the backward pass of the last layer's attention": self._backward_attention(),
            "the logits": self._logits(),
            "the embedding": self._embedding(),
        }
        return max(
            ((name, instant) for name, instant in instants.items() if instant is not None),
            key=lambda pair: sum(pair[1].values()),
        )

    def kept(self) -> Instant:
        """Return what all layers keep between the forward and the backward pass."""
        instant = self._saved_before(self._reach.layer + 1)
        del instant[WORKING]
        return instant

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

    def _loss_gradients(self, layer: int, has_output: bool = True) -> int:
        """Return the bytes of gradients that the losses of a layer keep from the forward pass.

        Args:
            has_output: whether to count the gradient of the layer's output.
        """
        sizes, total = self.sizes, 0
        if layer in self._compared:
            total += sizes.tokens * sizes.operand_features * sizes.element
            total += sizes.q if self._keeps_attention_output else 0
        if self._objective.hidden_cosine and has_output:
            states = hidden_states(self._objective, sizes.spec.num_layers)
            total += sizes.residual if layer + 1 in states else 0
        return total

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
        if self.parallel.offload:
            return instant
        for before in range(layer):
            instant[ACTIVATIONS] += self._saved_input(before)
            instant[RELATIONS_KIND] += self._loss_gradients(before)
            if not self.parallel.activation_checkpointing:
                _add_layer(instant, self._layers[before])
        return instant

    def _student_state(self, layer: int) -> Instant:
        """Return the student's tensors while the losses of a layer are computed."""
        sizes, instant = self.sizes, Instant()
        saved = self._layers[layer]
        is_saved = not (self.parallel.activation_checkpointing or self.parallel.offload)
        # q, k and v as attention saved them, or as tensors of the pair.
        has_saved_qkv = is_saved and saved.attention > 0
        if is_saved:
            _add_layer(instant, saved)
        if has_saved_qkv:
            instant[WORKING] += 0 if sizes.layout.cp == 1 else 2 * sizes.k
        else:
            instant[WORKING] += sizes.qkv + (sizes.q if self._keeps_attention_output else 0)
        instant[ACTIVATIONS] += sizes.residual
        if layer < self._whole_layers:
            instant[WORKING] += sizes.residual
        return instant

    def _teacher_state(self, layer: int) -> int:
        """Return the bytes of the teacher's tensors of a layer, and of its input."""
        if not self._teacher:
            return 0
        sizes = self.sizes
        total = sizes.qkv + (sizes.q if self._keeps_attention_output else 0)
        total += sizes.residual if layer < self._whole_layers else 0
        return total + (sizes.residual if layer else 0)

    def _during_losses(self, layer: int) -> Instant:
        """Return what is in use while the losses of a layer are computed, without their tensors."""
        instant = self._saved_before(layer) + self._student_state(layer)
        instant[WORKING] += self._teacher_state(layer)
        instant[RELATIONS_KIND] += self._loss_gradients(layer)
        return instant

    def _relations(self) -> Instant | None:
        """Return the instant at the last of the last layer's relations."""
        names = list(self._objective.active_relations())
        if not names:
            return None
        sizes, last = self.sizes, RELATIONS[names[-1]]
        instant = self._during_losses(self._compared[-1])
        statistics = 3 * FP32_BYTES * sizes.tokens * sizes.relation_heads(names[-1])
        # The columns' gradient in fp32, in the order of the accumulators.
        columns = FP32_BYTES * sizes.tokens * sizes.features(last.columns)
        uses = sum(len(RELATIONS[name].operands) for name in names)
        if sizes.layout.cp > 1:
            instant[RELATIONS_KIND] += self._exchanged(names)
        elif uses > len(sizes.operands):
            # The gradients are added up in fp32, and then cast.
            fp32 = FP32_BYTES * sizes.tokens * sizes.operand_features
            result = sum(FP32_BYTES * sizes.tokens * sizes.features(x) for x in last.operands)
            instant[RELATIONS_KIND] += fp32 + result + statistics
        else:
            instant[RELATIONS_KIND] += columns + statistics
        return instant

    def _attention_outputs(self) -> Instant | None:
        """Return the instant at the errors of the last layer's attention outputs, in fp32."""
        if not self._objective.attention_output:
            return None
        instant = self._during_losses(self._compared[-1])
        instant[WORKING] += 4 * FP32_BYTES * self.sizes.q // self.sizes.element
        return instant

    def _hidden_states(self) -> Instant | None:
        """Return the instant at the cosine of the last hidden state, in fp32."""
        if not self._objective.hidden_cosine:
            return None
        sizes = self.sizes
        state = hidden_states(self._objective, sizes.spec.num_layers)[-1]
        instant = self._during_losses(state - 1)
        instant[WORKING] += 6 * FP32_BYTES * sizes.residual // sizes.element
        if state == sizes.spec.num_layers:
            instant[WORKING] += 2 * sizes.residual  # the norms' outputs
        return instant

    def _dropout(self) -> Instant | None:
        """Return the instant at which the last dropout mask is drawn, in int64 arithmetic."""
        if not self.dropout:
            return None
        layer, sizes = self._reach.layer, self.sizes
        instant = self._saved_before(layer)
        instant[ACTIVATIONS] += sizes.residual
        instant[WORKING] += self._teacher_state(layer) + sizes.residual  # and the norm's output
        instant[WORKING] += 4 * _INT64_BYTES * sizes.rows * sizes.spec.hidden_size
        return instant

    def _exchanged(self, names: list[str]) -> int:
        """Return the bytes of chunks, gradients and row statistics when gradients are sent back."""
        sizes, held = self.sizes, self.sizes.chunks_held
        features = sizes.tokens * sizes.operand_features
        chunks = 2 * held * features * sizes.element  # of student and teacher
        gradients = held * features * FP32_BYTES
        exchange = 2 * (held - 1) * features * sizes.element
        heads = sum(map(sizes.relation_heads, names))
        # Five partial sums and three statistics of every row of the blocks.
        statistics = (5 + 3) * FP32_BYTES * sizes.all_tokens * heads
        # The gradients of the last pair of pieces.
        last = FP32_BYTES * sizes.tokens * sizes.features(RELATIONS[names[-1]].rows)
        return chunks + gradients + exchange + statistics + last

    def _forward_mlp(self) -> Instant | None:
        """Return the instant at the end of the student's last MLP."""
        if not self._whole_layers:
            return None
        layer, sizes = self._whole_layers - 1, self.sizes
        instant = self._saved_before(layer)
        instant[ACTIVATIONS] += sizes.residual
        if self.parallel.activation_checkpointing or self.parallel.offload:
            instant[WORKING] += sizes.qkv + sizes.q + 2 * sizes.gate
            instant[WORKING] += 2 * sizes.residual
        else:
            _add_layer(instant, self._layers[layer])
            instant[WORKING] += sizes.residual
        if sizes.layout.tp > 1:
            instant[WORKING] += sizes.hidden
        # The product of gate and up, and the output.
        instant[WORKING] += sizes.gate + sizes.hidden
        instant[WORKING] += self._teacher_state(layer)
        return instant

    def _backward(self) -> Instant:
        """Return what the backward pass of the last whole layer begins with."""
        layer, sizes = self._whole_layers - 1, self.sizes
        instant = self._saved_before(layer)
        if self._teacher:
            instant[WORKING] -= sizes.rope_tables  # the teacher's
        instant[RELATIONS_KIND] += self._loss_gradients(layer, has_output=False)
        instant[ACTIVATIONS] += sizes.residual
        instant[WORKING] += sizes.residual  # the gradient of the layer's output
        instant[LOGITS] += self._pending_head_gradient()
        return instant

    def _backward_mlp(self) -> Instant | None:
        """Return the instant at which the backward pass of the MLP needs most."""
        if not self._whole_layers:
            return None
        layer, sizes = self._whole_layers - 1, self.sizes
        instant, saved = self._backward(), self._layers[layer]
        if self.parallel.offload and not self.parallel.activation_checkpointing:
            instant[WORKING] += 2 * sizes.gate  # what the present operation reads
        else:
            _add_layer(instant, saved, self._kind_of_layer)
        down, is_split = self.trained.in_layer(layer).get("down_proj", 0), sizes.layout.tp > 1
        gathered = sizes.hidden if is_split else 0
        # The input of gate and up while the layer is computed again.
        again = (sizes.hidden if is_split else sizes.residual) if not down else 0
        released = (sizes.gate + self._cast(down)) if down else 0
        instant[WORKING] += max(
            gathered + again,
            gathered + sizes.gate + sizes.element * down,
            sizes.gate + self._weight_gradient(down) - released,
            3 * sizes.gate - released,
        )
        return instant

    def _backward_attention(self) -> Instant | None:
        """Return the instant at the gradients of k and v of other ranks."""
        if self.sizes.layout.cp == 1 or not self._whole_layers:
            return None
        layer, sizes = self._whole_layers - 1, self.sizes
        instant, saved = self._backward(), self._layers[layer]
        instant[self._kind_of_layer] += saved.projections + saved.attention + saved.casts
        instant[GATHERED] += saved.gathered
        # Gradients of the output and of q (twice), and of k and v: of all ranks, of the remote
        # part that is being computed, and of the local chunk.
        others = sizes.layout.cp - 1
        instant[WORKING] += 3 * sizes.q
        instant[GATHERED] += 2 * sizes.k * (sizes.layout.cp + others + 1)
        return instant

    @property
    def _kind_of_layer(self) -> str:
        """The kind of what a layer saves in its backward pass: kept, or computed again."""
        again = self.parallel.activation_checkpointing or self.parallel.offload
        return WORKING if again else ACTIVATIONS

    def _cast(self, weight: int) -> int:
        """Return the bytes of the cast of a trained weight of so many elements."""
        is_cast = self.sizes.element < FP32_BYTES and not self.trained.is_gathered
        return weight * self.sizes.element if is_cast else 0

    def _weight_gradient(self, weight: int) -> int:
        """Return the bytes of a weight's gradient before it is added to the buffer."""
        rounded = weight * self.sizes.element if self.sizes.element < FP32_BYTES else 0
        return rounded + FP32_BYTES * weight

    def _pending_head_gradient(self) -> int:
        """Return the bytes of a tied embedding's gradient, which waits for the embedding's part."""
        spec = self.sizes.spec
        if not (self._reach.head and spec.tied_embeddings and self.trained.has_embedding):
            return 0
        return FP32_BYTES * self.sizes.vocabulary * spec.hidden_size

    def _logits(self) -> Instant | None:
        """Return the instant at the logits of the last chunk of rows."""
        if not self._reach.head:
            return None
        sizes, instant = self.sizes, self._saved_before(self.sizes.spec.num_layers)
        is_kl = self._objective.logits_kl > 0
        instant[ACTIVATIONS] += sizes.residual + sizes.hidden * (2 if is_kl else 1)
        chunk = min(ROWS, sizes.tokens) * sizes.vocabulary
        head = "embed_tokens" if sizes.spec.tied_embeddings else "lm_head"
        weight = self.trained.outside_layers().get(head, 0)
        # Cross-entropy: the logits, what is saved of them, and two tensors at work. KL: logits,
        # log-probabilities, probabilities and their differences.
        computed = FP32_BYTES * chunk * (8 if is_kl else 3) + self._cast(weight)
        # The gradient of a trained head is summed over the chunks in fp32.
        instant[LOGITS] += FP32_BYTES * weight + max(computed, self._weight_gradient(weight))
        return instant

    def _embedding(self) -> Instant | None:
        """Return the instant at the gradient of the embedding, at the end of the backward pass."""
        if not self.trained.has_embedding:
            return None
        instant = Instant()
        instant[WORKING] += 2 * FP32_BYTES * self.sizes.residual // self.sizes.element
        weight = self.trained.outside_layers()["embed_tokens"]
        instant[LOGITS] += FP32_BYTES * weight + self._pending_head_gradient()
        return instant


def _add_layer(instant: Instant, saved: SavedLayer, kind: str = ACTIVATIONS) -> None:
    instant[kind] += saved.projections + saved.attention + saved.rest + saved.casts
    instant[GATHERED] += saved.gathered
