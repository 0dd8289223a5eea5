"""The time of a step, from the operations and bytes of one rank and the rates of its GPU.

Everything that a rank does is added up, because the kernels of one CUDA stream run one after the
other: products with weights, attention, relations, pointwise kernels, exchanges that nothing hides,
and the update. Waiting for the host, for text, for evaluation and for saves is not part of the
estimate.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod

import torch

from megalard.config.schema import Config, ParallelConfig, StreamConfig
from megalard.distill.objective import reaches_of
from megalard.distill.reach import LayerDepth, deepest
from megalard.estimate.flops import flops_by_kind
from megalard.estimate.gathered_layers import has_rows_of
from megalard.estimate.gpus import Gpu, Machines
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.sizes import FP32_BYTES, Sizes
from megalard.estimate.trained import Trained, TrainedTensor, gradient_bytes
from megalard.estimate.weights import slices_over, trained_of
from megalard.model.names import ParameterName
from megalard.model.spec import ModelSpec

PRODUCTS, ATTENTION, RELATIONS_KIND = "products", "attention", "relations"
POINTWISE, EXCHANGE, OFFLOAD, UPDATE = "pointwise", "exchanges", "offloading", "update"
HOST = "launches of the host"

# AdamW reads a gradient, a weight and two moments and writes three of them. The gradient is also
# set to zero, measured and clipped, and a whole one is summed.
_ADAMW_BYTES = 28
_DIVIDED_UPDATE_BYTES = _ADAMW_BYTES + 4 + 4 + 8
_UPDATE_BYTES = _DIVIDED_UPDATE_BYTES + 4

HOST_UPDATE = 98e9
"""Bytes per second of AdamW on the CPU, per rank.

With eight threads, in docs/figures/optimizer_offload/llama-1b.json. Several ranks of a node share
the bandwidth of its memory.
"""


Seconds = defaultdict[str, float]
"""Seconds by kind of work."""


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step, by kind of work, and the steps of the stage."""

    kinds: Seconds
    steps: int

    @property
    def seconds(self) -> float:
        """Seconds of one step."""
        return sum(self.kinds.values())


def run_times(
    config: Config, spec: ModelSpec, layout: RankLayout, machines: Machines
) -> dict[str, StepTime]:
    """Return the time of a step of each stage, by the name of the stage."""
    return {
        name: StepTime(step_time(stage, spec, layout, machines), stage.optimizer.steps)
        for name, stage in config.all_stages().items()
    }


def step_time(stage: Config, spec: ModelSpec, layout: RankLayout, machines: Machines) -> Seconds:
    """Return the seconds of one step of a stage by kind of work."""
    trained, element = trained_of(stage, spec, layout), _element(stage)
    total = update_time(trained, stage.parallel, element, layout, machines)
    for stream in stage.all_streams().values():
        micro_step = micro_step_time(stage, stream, spec, layout, machines)
        count = -(-stream.global_batch // (stream.micro_batch * layout.dp))
        for kind, seconds in micro_step.items():
            total[kind] += count * seconds
    return total


def update_time(
    trained: Trained, parallel: ParallelConfig, element: int, layout: RankLayout, machines: Machines
) -> Seconds:
    """Return the seconds of the update: sums over ranks that follow the passes, and AdamW.

    Where masters are divided, the sums precede the update, and the weights are gathered after it.

    Args:
        element: bytes of an element in the compute dtype.
    """
    gpu, seconds = machines.gpu, Seconds(float)
    for tensor in trained.tensors.values():
        rate, others = _rate_over(tensor, layout, machines), 1 - 1 / tensor.holders
        if not tensor.is_divided:
            seconds[UPDATE] += tensor.elements * _UPDATE_BYTES / gpu.update
            seconds[EXCHANGE] += 2 * others * tensor.elements * FP32_BYTES / rate
            continue
        seconds[EXCHANGE] += others * tensor.elements * element / rate
        # Masters are rounded, and the gathered weights are copied.
        copied = (FP32_BYTES + element) * tensor.share + 2 * element * tensor.elements
        seconds[POINTWISE] += copied / gpu.pointwise
        if parallel.offload_optimizer:
            seconds[UPDATE] += tensor.share * _ADAMW_BYTES / HOST_UPDATE
            seconds[OFFLOAD] += 2 * tensor.share * FP32_BYTES / gpu.host
        else:
            seconds[UPDATE] += tensor.share * _DIVIDED_UPDATE_BYTES / gpu.update
    return seconds


def reduction_time(
    trained: Trained, parallel: ParallelConfig, element: int, layout: RankLayout, machines: Machines
) -> Seconds:
    """Return the seconds in which a micro-batch's divided gradients are packed and summed.

    The exchanges overlap the backward pass.

    Args:
        element: bytes of an element in the compute dtype.
    """
    gradient, seconds = gradient_bytes(parallel), Seconds(float)
    for tensor in trained.divided.values():
        rate, others = _rate_over(tensor, layout, machines), 1 - 1 / tensor.holders
        seconds[EXCHANGE] += others * tensor.elements * gradient / rate
        # Gradients are packed and tested, and sums are added.
        moved = (element + 2 * gradient) * tensor.elements + 3 * gradient * tensor.share
        seconds[POINTWISE] += moved / machines.gpu.pointwise
    return seconds


def micro_step_time(
    stage: Config, stream: StreamConfig, spec: ModelSpec, layout: RankLayout, machines: Machines
) -> Seconds:
    """Return the seconds of the forward and backward pass of one micro-batch on one rank."""
    element = _element(stage)
    work = _Work(stage, Sizes(spec, stream, layout, element), machines)
    seconds = work.seconds()
    trained = trained_of(stage, spec, layout)
    sums = reduction_time(trained, stage.parallel, element, layout, machines)
    backward = work.backward_seconds()
    forward = sum(seconds.values()) - backward
    gathers = gather_times(trained, stage, stream, spec, layout, machines)
    seconds[POINTWISE] += sums[POINTWISE]
    seconds[EXCHANGE] += max(0.0, gathers[0] - forward)
    seconds[EXCHANGE] += max(0.0, sums[EXCHANGE] + gathers[1] - backward)
    return seconds


def gather_times(
    trained: Trained,
    stage: Config,
    stream: StreamConfig,
    spec: ModelSpec,
    layout: RankLayout,
    machines: Machines,
) -> tuple[float, float]:
    """Return the seconds of gathering layers in the forward and in the backward pass.

    They are zero without ``parallel.shard_weights``. The gathers overlap the computation.
    """
    if not stage.parallel.shard_weights:
        return 0.0, 0.0
    reach = deepest(reaches_of(stream.objective, spec.num_layers))
    forward, backward = 0.0, 0.0
    for name, held in slices_over(spec, layout.tp).items():
        layer = ParameterName.parse(name).layer
        is_reached = layer is not None and layer <= reach.layer
        if not (is_reached and has_rows_of(name, held, stage.parallel, layout)):
            continue
        others = 1 - 1 / (layout.data * held.replicas)
        sent = others * prod(held.local_shape) * _element(stage)
        seconds = sent / _rate(layout.tp * layout.data, machines)
        is_separate = name in trained.tensors or stage.model.student is not None
        forward += seconds * (2 if stream.objective.needs_teacher and is_separate else 1)
        backward += seconds
    return forward, backward


def _element(stage: Config) -> int:
    """Return the bytes of an element in the compute dtype."""
    return getattr(torch, stage.model.compute_dtype).itemsize


@dataclass(frozen=True)
class _Work:
    stage: Config
    sizes: Sizes
    machines: Machines

    @property
    def _gpu(self) -> Gpu:
        return self.machines.gpu

    def seconds(self) -> Seconds:
        sizes, gpu, stream = self.sizes, self._gpu, self.sizes.stream
        layout, length = sizes.layout, sizes.stream.data.context_length
        flops = flops_by_kind(stream, self.stage.trainable, sizes.spec)
        # This rank's share of all blocks' operations.
        share = sizes.blocks / (layout.cp * layout.tp)
        rates = gpu.heads(sizes.spec.head_dim)
        slower = 1.0 if sizes.element == 2 else 2.0  # fp32 products as TF32
        local = length / layout.cp
        again, attention_again = self._computed_again()
        attention = flops.attention_forward * (1 + attention_again)
        seconds = Seconds(
            float,
            {
                PRODUCTS: (flops.products + again) * share * slower / gpu.products,
                ATTENTION: share
                * slower
                * (
                    attention / rates.attention_forward.at(local)
                    + flops.attention_backward / rates.attention_backward.at(local)
                ),
                RELATIONS_KIND: share
                * slower
                * (
                    flops.relation_forward / rates.relation_forward.at(local)
                    + flops.relation_backward / rates.relation_backward.at(local)
                ),
                POINTWISE: self._pointwise_bytes() / gpu.pointwise,
                EXCHANGE: self._exchange_seconds(),
            },
        )
        # The copies run next to the computation; only what takes longer than it is waited for.
        copies = 2 * self._offloaded_bytes() / gpu.host
        seconds[OFFLOAD] = max(0.0, copies - sum(seconds.values()))
        return seconds

    def backward_seconds(self) -> float:
        """Return the seconds of the backward pass that hide exchanges: products and attention."""
        sizes, layout = self.sizes, self.sizes.layout
        flops = flops_by_kind(sizes.stream, self.stage.trainable, sizes.spec)
        share = sizes.blocks / (layout.cp * layout.tp) * (1.0 if sizes.element == 2 else 2.0)
        rate = self._gpu.heads(sizes.spec.head_dim).attention_backward
        local = sizes.stream.data.context_length / layout.cp
        products = flops.products - flops.products_forward + self._computed_again()[0]
        return share * (products / self._gpu.products + flops.attention_backward / rate.at(local))

    @property
    def _models(self) -> int:
        return 2 if self.sizes.stream.objective.needs_teacher else 1

    @property
    def _whole_layers(self) -> int:
        reach = deepest(reaches_of(self.sizes.stream.objective, self.sizes.spec.num_layers))
        return reach.layer + (reach.depth == LayerDepth.WHOLE)

    def _computed_again(self) -> tuple[float, float]:
        """Return what activation checkpointing computes again for one block.

        Returns:
            The operations of products, and the share of attention's forward passes. A layer is
            computed again up to its last saved tensor, which excludes the last projection.
        """
        if not self.stage.parallel.activation_checkpointing:
            return 0.0, 0.0
        spec = self.sizes.spec
        q_features = spec.num_heads * spec.head_dim
        kv_features = spec.num_kv_heads * spec.head_dim
        qkv = spec.hidden_size * (q_features + 2 * kv_features)
        rest = q_features * spec.hidden_size + 2 * spec.hidden_size * spec.intermediate_size
        weights = (qkv + rest) * self._whole_layers + self._lora_weights()
        return 2 * self.sizes.stream.data.context_length * weights, 1 / self._models

    def _lora_weights(self) -> int:
        """Return the elements of all LoRA pairs of the whole layers."""
        trainable, spec = self.stage.trainable, self.sizes.spec
        if trainable.mode != "lora":
            return 0
        features = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
        features["o"] = spec.num_heads
        wide = sum(features[t] * spec.head_dim + spec.hidden_size for t in trainable.lora.targets)
        return trainable.lora.rank * wide * self._whole_layers

    def _pointwise_bytes(self) -> float:
        """Return the bytes that pointwise kernels read and write.

        Per layer, in features of a token: the forward pass has two norms (read and write), two sums
        (three each), RoPE of q and k and SwiGLU (three). The backward pass has in addition the sums
        of gradients of the layer's input over projections and relations.
        """
        sizes, spec = self.sizes, self.sizes.spec
        residual, whole = spec.hidden_size / sizes.layout.tp, self._whole_layers
        q, k = sizes.features("q"), sizes.features("k")
        inner = spec.intermediate_size / sizes.layout.tp
        hidden = spec.hidden_size
        forward = 10 * residual + 2 * (q + k) + 3 * inner
        backward = 18 * residual + 10 * hidden + 5 * (q + 2 * k) + 2 * (q + k) + 5 * inner
        runs = self._models + (1 if self.stage.parallel.activation_checkpointing else 0)
        features = whole * (runs * forward + backward)
        total = sizes.tokens * features * sizes.element
        if self.stage.trainable.mode == "lora" and self.stage.trainable.lora.dropout:
            # A mask takes 14 kernels, most of which read and write int64 numbers. It is made in the
            # forward pass, in the backward pass, and where a layer is computed again.
            masks = 2 + (1 if self.stage.parallel.activation_checkpointing else 0)
            total += masks * 14 * 16 * sizes.rows * spec.hidden_size * whole
        return total + self._sharded_relation_bytes() + self._logits_bytes()

    def _sharded_relation_bytes(self) -> float:
        """Return the bytes of copies and sums around relations over cp ranks, per micro-batch."""
        sizes, held = self.sizes, self.sizes.chunks_held
        if sizes.layout.cp == 1 or not sizes.operands:
            return 0.0
        objective = sizes.stream.objective
        layers = len(objective.layers or range(sizes.spec.num_layers))
        # Copies of student and teacher; fp32 gradients of every chunk: zeros, sums, casts.
        per_feature = 8 + held * (4 + 18 + 6) + 10 * (held - 1)
        return layers * sizes.tokens * sizes.operand_features * per_feature

    def _logits_bytes(self) -> float:
        """Return the bytes of pointwise work on logits: some 15 fp32 passes, or twice for a KL."""
        sizes, objective = self.sizes, self.sizes.stream.objective
        passes = (15 if objective.language_modelling else 0) + (30 if objective.logits_kl else 0)
        return passes * FP32_BYTES * sizes.tokens * sizes.vocabulary

    def _exchange_seconds(self) -> float:
        """Return the seconds of exchanges that no computation hides."""
        sizes, layout = self.sizes, self.sizes.layout
        seconds, whole = 0.0, self._whole_layers
        runs = self._models + 1 + (1 if self.stage.parallel.activation_checkpointing else 0)
        if layout.tp > 1:
            # Two gathers and two reduce-scatters per layer and pass, and those of LoRA's products.
            lora = self.stage.trainable.mode == "lora"
            rank = self.stage.trainable.lora.rank * len(self.stage.trainable.lora.targets)
            sent = float(runs * 4 * sizes.hidden)
            if lora:
                sent += (runs - self._models + 1) * sizes.tokens * rank * sizes.element
            sent *= (layout.tp - 1) / layout.tp
            seconds += whole * sent / _rate(layout.tp, self.machines)
        if layout.cp > 1:
            # K and V are gathered in every forward pass, and their gradients are scattered. The
            # products of the local chunk hide up to 1/P of attention's time.
            sent = runs * 2 * sizes.k * (layout.cp - 1)
            exchange = whole * sent / _rate(layout.tp * layout.cp, self.machines)
            flops = flops_by_kind(sizes.stream, self.stage.trainable, sizes.spec)
            attention = (flops.attention_forward + flops.attention_backward) * sizes.blocks
            rate = self._gpu.heads(sizes.spec.head_dim).attention_forward.at(sizes.tokens)
            hidden = attention / (layout.cp * layout.tp) / rate / layout.cp
            seconds += max(0.0, exchange - hidden)
        return seconds

    def _offloaded_bytes(self) -> float:
        """Return the bytes that move to host memory, and back."""
        if not self.stage.parallel.offload:
            return 0.0
        sizes, objective = self.sizes, self.sizes.stream.objective
        layers = len(objective.layers or range(sizes.spec.num_layers))
        relations = sizes.tokens * sizes.operand_features * sizes.element * layers
        if self.stage.parallel.activation_checkpointing:
            return sizes.residual * self._whole_layers + relations
        saved = 2 * sizes.residual + sizes.qkv + sizes.q + 2 * sizes.gate + sizes.row_statistics
        return saved * self._whole_layers + relations


def _rate_over(tensor: TrainedTensor, layout: RankLayout, machines: Machines) -> float:
    """Return the bytes per second that a rank sends to the other holders of a tensor."""
    ranks = layout.tp * layout.data if layout.data > 1 else tensor.holders
    return _rate(ranks, machines)


def _rate(neighbors: int, machines: Machines) -> float:
    """Return the bytes per second that a rank sends to the others of an axis.

    Args:
        neighbors: the number of consecutive ranks that the axis reaches over.
    """
    if neighbors <= machines.per_node:
        return machines.gpu.node_exchange
    return machines.network
