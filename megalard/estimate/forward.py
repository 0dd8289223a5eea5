"""The instants of the forward pass at which much memory is in use.

An *instant* is a place in the step with all tensors that live there.
"""

from __future__ import annotations

from collections.abc import Iterator

from megalard.config.objective import RELATIONS
from megalard.distill.terms.hidden_cosine import hidden_states
from megalard.estimate.saved import (
    ACTIVATIONS,
    ON_THE_WAY,
    RELATIONS_KIND,
    WORKING,
    Instant,
    MicroBatch,
    add_layer,
)
from megalard.estimate.sizes import FP32_BYTES

_INT64_BYTES = 8


class ForwardPass(MicroBatch):
    """The forward pass of one micro-batch on one rank."""

    def instants(self) -> Iterator[tuple[str, Instant]]:
        """Yield the instants by name."""
        instants = {
            "LoRA's dropout in the last layer": self._dropout(),
            "the relations of the last layer": self._relations(),
            "the attention outputs of the last layer": self._attention_outputs(),
            "the hidden states": self._hidden_states(),
            "the MLP of the last layer": self._forward_mlp(),
        }
        for name, instant in instants.items():
            if instant is not None:
                instant[ON_THE_WAY] += self.buckets.waiting()
                yield name, instant

    def _student_state(self, layer: int) -> Instant:
        """Return the student's tensors while the losses of a layer are computed."""
        sizes, instant = self.sizes, Instant()
        saved = self._layers[layer]
        is_saved = not (self.parallel.activation_checkpointing or self.parallel.offload)
        # q, k and v as attention saved them, or as tensors of the pair.
        has_saved_qkv = is_saved and saved.attention > 0
        if is_saved:
            add_layer(instant, saved)
        if has_saved_qkv:
            instant[WORKING] += 0 if sizes.layout.cp == 1 else 2 * sizes.k
        else:
            instant[WORKING] += sizes.qkv + (sizes.q if self._keeps_attention_output else 0)
        instant[ACTIVATIONS] += sizes.residual
        if layer < self._whole_layers:
            instant[WORKING] += sizes.residual
        return instant

    def _during_losses(self, layer: int) -> Instant:
        """Return what is in use while the losses of a layer are computed, without their tensors."""
        instant = self._saved_before(layer) + self._student_state(layer)
        instant[WORKING] += self._teacher_state(layer)
        instant[RELATIONS_KIND] += sum(self._loss_gradients(layer))
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
            if not self.parallel.activation_checkpointing:
                instant[WORKING] += sizes.gate  # which leaves for the host
        else:
            add_layer(instant, self._layers[layer])
            instant[WORKING] += sizes.residual
        if sizes.layout.tp > 1:
            instant[WORKING] += sizes.hidden
        # The product of gate and up, and the output.
        instant[WORKING] += sizes.gate + sizes.hidden
        instant[WORKING] += self._teacher_state(layer)
        return instant
