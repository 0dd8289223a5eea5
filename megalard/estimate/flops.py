"""The floating-point operations that a step needs, by kind.

What is computed twice, as under activation checkpointing, counts once. The ratio of the needed
operations to the peak of the GPUs is the model FLOP utilization (MFU).
"""

from __future__ import annotations

from dataclasses import dataclass

from megalard.config.objective import RELATIONS
from megalard.config.schema import Config, StreamConfig, TrainableConfig
from megalard.distill.objective import reaches_of
from megalard.distill.reach import LayerDepth, deepest
from megalard.model.spec import ModelSpec


@dataclass(frozen=True)
class Flops:
    """Operations, by the kernel that computes them.

    Attributes:
        products: products of activations with weights, and of weight gradients.
        products_forward: those of them that the forward passes of teacher and student need.
        attention_forward, attention_backward: attention.
        relation_forward, relation_backward: the relations.
    """

    products: float
    products_forward: float
    attention_forward: float
    attention_backward: float
    relation_forward: float
    relation_backward: float

    @property
    def total(self) -> float:
        """All operations."""
        attention = self.attention_forward + self.attention_backward
        return self.products + attention + self.relation_forward + self.relation_backward


def step_flops(config: Config, spec: ModelSpec) -> float:
    """Return the operations of one step over all ranks and streams."""
    return sum(
        stream_flops(stream, config.trainable, spec) * stream.global_batch
        for stream in config.all_streams().values()
    )


def stream_flops(stream: StreamConfig, trainable: TrainableConfig, spec: ModelSpec) -> float:
    """Return the operations for one block of a stream, as if it held a single document."""
    return flops_by_kind(stream, trainable, spec).total


def flops_by_kind(stream: StreamConfig, trainable: TrainableConfig, spec: ModelSpec) -> Flops:
    """Return the operations of ``stream_flops`` by kind."""
    objective, tokens = stream.objective, stream.data.context_length
    reach = deepest(reaches_of(objective, spec.num_layers))
    qkv_layers = reach.layer + 1
    attention_layers = reach.layer + (reach.depth >= LayerDepth.ATTENTION)
    whole_layers = reach.layer + (reach.depth == LayerDepth.WHOLE)

    q_features = spec.num_heads * spec.head_dim
    kv_features = spec.num_kv_heads * spec.head_dim
    qkv = spec.hidden_size * (q_features + 2 * kv_features)
    rest = q_features * spec.hidden_size + 3 * spec.hidden_size * spec.intermediate_size
    head = spec.vocab_size * spec.hidden_size if reach.head else 0
    weights = qkv * qkv_layers + rest * whole_layers + head
    pairs = tokens**2 / 2
    attention = 4 * pairs * q_features * attention_layers

    # The input of the first layer needs no gradient unless the embedding is trained.
    untrained_input = 0 if trainable.mode == "all" else qkv
    models = 2 if objective.needs_teacher else 1
    trained = _trained_products(trainable, spec, qkv_layers, whole_layers, weights) * tokens
    forward = 2.0 * tokens * models * weights
    if trainable.mode == "lora":
        forward += trained / 3
    products = 2.0 * tokens * (models * weights + weights - untrained_input) + trained
    relation_products = 0.0
    for name in objective.active_relations():
        heads = spec.num_heads if RELATIONS[name].rows == "q" else spec.num_kv_heads
        layers = len(objective.layers or range(spec.num_layers))
        relation_products += 2 * pairs * spec.head_dim * heads * layers
    # Over the causal pairs, a relation has two products forward and four backward.
    return Flops(
        products,
        forward,
        models * attention,
        2.5 * attention,
        2 * relation_products,
        4 * relation_products,
    )


def _trained_products(
    trainable: TrainableConfig, spec: ModelSpec, qkv_layers: int, whole_layers: int, weights: int
) -> float:
    """Return the operations per token that training adds: weight gradients and LoRA's products."""
    if trainable.mode == "all":
        return 2 * weights
    q_features = spec.num_heads * spec.head_dim
    kv_features = spec.num_kv_heads * spec.head_dim
    shapes = {
        "q": (spec.hidden_size, q_features, qkv_layers),
        "k": (spec.hidden_size, kv_features, qkv_layers),
        "v": (spec.hidden_size, kv_features, qkv_layers),
        "o": (q_features, spec.hidden_size, whole_layers),
    }
    if trainable.mode == "weights":
        return sum(2 * i * o * n for i, o, n in (shapes[name] for name in trainable.weights))
    lora = trainable.lora
    # Forward, gradient of the input, and gradient of the pair.
    return sum(6 * lora.rank * (i + o) * n for i, o, n in (shapes[t] for t in lora.targets))
