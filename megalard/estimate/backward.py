"""The instants of the backward pass at which much memory is in use.

The loss of the logits and its gradient are computed together, for some rows at a time, so that they
belong to the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

from megalard.distill.terms.row_slices import ROWS
from megalard.estimate.saved import (
    ACTIVATIONS,
    GATHERED,
    LOGITS,
    ON_THE_WAY,
    RELATIONS_KIND,
    WORKING,
    Instant,
    MicroBatch,
    add_layer,
)
from megalard.estimate.sizes import FP32_BYTES

# The last layers differ: those before them find gradients of complete layers on the way.
_LAYERS = 4


class BackwardPass(MicroBatch):
    """The backward pass of one micro-batch on one rank."""

    def instants(self) -> Iterator[tuple[str, Instant]]:
        """Yield the instants by name."""
        first = self._whole_layers
        layers = range(first - 1, max(-1, first - 1 - _LAYERS), -1)
        instants = [
            ("the logits", self._logits()),
            ("the gradient of the head", self._head_gradient()),
            *(("the backward pass of an MLP", self._backward_mlp(layer)) for layer in layers),
            *(("the backward pass of attention", self._backward_attention(n)) for n in layers),
            ("the gradient of the embedding", self._embedding()),
        ]
        for name, instant in instants:
            if instant is not None:
                yield name, instant

    def _backward(self, layer: int) -> Instant:
        """Return what the backward pass of a whole layer begins with."""
        sizes = self.sizes
        instant = self._saved_before(layer)
        if self._teacher:
            instant[WORKING] -= sizes.rope_tables  # the teacher's
        instant[RELATIONS_KIND] += sum(self._loss_gradients(layer, has_output=False))
        instant[ACTIVATIONS] += sizes.residual
        instant[WORKING] += sizes.residual  # the gradient of the layer's output
        instant[LOGITS] += self._pending_head_gradient()
        return instant

    def _backward_mlp(self, layer: int) -> Instant:
        """Return the instant at which the backward pass of a whole layer's MLP needs most."""
        sizes = self.sizes
        instant, saved = self._backward(layer), self._layers[layer]
        if self.parallel.offload and not self.parallel.activation_checkpointing:
            instant[WORKING] += 2 * sizes.gate  # what the present operation reads
        else:
            add_layer(instant, saved, self._kind_of_layer)
        down, is_split = self.trained.in_layer(layer).get("down_proj", 0), sizes.layout.tp > 1
        gathered = sizes.hidden if is_split else 0
        # The input of gate and up while the layer is computed again.
        again = (sizes.hidden if is_split else sizes.residual) if not down else 0
        released = (sizes.gate + self._cast(layer, "down_proj")) if down else 0
        before = self.trained.names_after(layer)
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        after = {*before, name} if down else before
        waiting, packing = self.buckets.waiting(before), self.buckets.packing(before, name)
        # Bytes of the layer's tensors, and of gradients on the way.
        choices = [
            (gathered + again, waiting),
            (gathered + sizes.gate + sizes.element * down, waiting),
            (sizes.gate + self._weight_gradient(layer, "down_proj") - released, packing),
            (3 * sizes.gate - released, self.buckets.waiting(after)),
        ]
        working, on_the_way = max(choices, key=sum)
        instant[WORKING] += working
        instant[ON_THE_WAY] += on_the_way
        return instant

    def _backward_attention(self, layer: int) -> Instant | None:
        """Return the instant at the gradients of k and v of other ranks."""
        if self.sizes.layout.cp == 1:
            return None
        sizes = self.sizes
        instant, saved = self._backward(layer), self._layers[layer]
        instant[self._kind_of_layer] += saved.projections + saved.attention + saved.casts
        instant[GATHERED] += saved.gathered
        # Gradients of the output and of q (twice), and of k and v: of all ranks, of the remote
        # part that is being computed, and of the local chunk.
        others = sizes.layout.cp - 1
        instant[WORKING] += 3 * sizes.q
        instant[GATHERED] += 2 * sizes.k * (sizes.layout.cp + others + 1)
        instant[ON_THE_WAY] += self.buckets.waiting(self.trained.names_after(layer))
        return instant

    @property
    def _kind_of_layer(self) -> str:
        """The kind of what a layer saves in its backward pass: kept, or computed again."""
        again = self.parallel.activation_checkpointing or self.parallel.offload
        return WORKING if again else ACTIVATIONS

    def _cast(self, layer: int | None, module: str) -> int:
        """Return the bytes of the cast of a trained weight; 0 if it is not trained."""
        is_cast = self.sizes.element < FP32_BYTES and not self.trained.is_divided(layer, module)
        return self.trained.in_layer(layer).get(module, 0) * self.sizes.element if is_cast else 0

    def _weight_gradient(self, layer: int | None, module: str) -> int:
        """Return the bytes of a weight's gradient before it is added to a buffer or packed."""
        weight = self.trained.in_layer(layer).get(module, 0)
        if self.trained.is_divided(layer, module):
            return 0  # it counts as on the way
        rounded = weight * self.sizes.element if self.sizes.element < FP32_BYTES else 0
        return rounded + FP32_BYTES * weight

    def _gradient_element(self, module: str) -> int:
        """Return the bytes of an element of the gradient that autograd computes."""
        return self.sizes.element if self.trained.is_divided(None, module) else FP32_BYTES

    def _pending_head_gradient(self) -> int:
        """Return the bytes of a tied embedding's gradient, which waits for the embedding's part."""
        spec = self.sizes.spec
        if not (self._reach.head and spec.tied_embeddings and self.trained.has_embedding):
            return 0
        return self._gradient_element("embed_tokens") * self.sizes.vocabulary * spec.hidden_size

    @property
    def _head(self) -> str:
        return "embed_tokens" if self.sizes.spec.tied_embeddings else "lm_head"

    def _logits(self) -> Instant | None:
        """Return the instant at the logits of the last chunk of rows."""
        if not self._reach.head:
            return None
        sizes, instant = self.sizes, self._saved_before(self.sizes.spec.num_layers)
        is_kl = self._objective.logits_kl > 0
        instant[ACTIVATIONS] += sizes.residual + sizes.hidden * (2 if is_kl else 1)
        rows = min(ROWS, sizes.tokens)
        # The gradients of the hidden states, and of those of the chunk.
        instant[WORKING] += sizes.hidden + sizes.hidden * rows // sizes.tokens
        chunk = rows * sizes.vocabulary
        weight = self.trained.outside_layers().get(self._head, 0)
        # Cross-entropy: the logits, what is saved of them, and two tensors at work. KL: logits,
        # log-probabilities, probabilities and their differences.
        computed = FP32_BYTES * chunk * (8 if is_kl else 3) + self._cast(None, self._head)
        part = self._gradient_element(self._head) * weight
        is_divided = self.trained.is_divided(None, self._head)
        gradient = part if is_divided else self._weight_gradient(None, self._head)
        # The gradient of a trained head is summed over the chunks in fp32. The part of one chunk
        # lives until the part of the next one is there.
        last = part if sizes.tokens > ROWS else 0
        instant[LOGITS] += FP32_BYTES * weight + last + max(computed, gradient)
        instant[ON_THE_WAY] += self.buckets.waiting()
        return instant

    def _head_gradient(self) -> Instant | None:
        """Return the instant at which the head's gradient is packed."""
        if not (self._reach.head and self.trained.is_divided(None, self._head)):
            return None
        sizes, instant = self.sizes, self._saved_before(self.sizes.spec.num_layers)
        instant[ACTIVATIONS] += sizes.residual + sizes.hidden
        if sizes.spec.tied_embeddings:
            weight = self.trained.outside_layers()[self._head]
            instant[LOGITS] += (FP32_BYTES + sizes.element) * weight
            instant[ON_THE_WAY] += self.buckets.waiting()
        else:
            instant[ON_THE_WAY] += self.buckets.packing((), "lm_head.weight")
        return instant

    def _embedding(self) -> Instant | None:
        """Return the instant at the gradient of the embedding, at the end of the backward pass."""
        if not self.trained.has_embedding:
            return None
        instant, name = Instant(), "model.embed_tokens.weight"
        is_divided = self.trained.is_divided(None, "embed_tokens")
        element = self._gradient_element("embed_tokens")
        instant[WORKING] += 2 * element * self.sizes.residual // self.sizes.element
        weight = self.trained.outside_layers()["embed_tokens"]
        instant[LOGITS] += self._pending_head_gradient()
        instant[LOGITS] += 0 if is_divided else FP32_BYTES * weight
        if is_divided:
            others = self.trained.tensors.keys() - {name}
            instant[ON_THE_WAY] += self.buckets.packing(others, name)
        return instant
