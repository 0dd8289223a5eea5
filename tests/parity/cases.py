"""The parity cases: what is trained on which model, and what a step must give on any layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from megalard.config.objective import ObjectiveConfig, RelationWeights
from megalard.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeConfig,
    RunConfig,
    StreamConfig,
    TrainableConfig,
)
from megalard.data.batch import Batch, collate
from megalard.data.positions import skipped_positions
from megalard.model.rope import scaled_config
from megalard.model.spec import read_spec
from tests.models import copy_with_config, make_model
from tests.parity.reference import ReferenceBatch, ReferenceTrainer

# The second step's gradients are of updated weights; tests/settings/ looks at more steps.
STEPS = 2
LENGTH = 24
GLOBAL_BATCH, MICRO_BATCH = 4, 2
ALL_RELATIONS = {"q": 1.0, "k": 0.5, "v": 2.0, "qk": 0.75}


@dataclass(frozen=True)
class Stream:
    """One stream of a case: the terms of its objective and its data, as in ``Case``."""

    terms: dict = field(hash=False)
    data: str = "packed"
    positions: str = "contiguous"
    length: int = LENGTH
    weight: float = 1.0
    global_batch: int = GLOBAL_BATCH


@dataclass(frozen=True)
class Case:
    """One row of the parity matrix.

    Attributes:
        data: the documents of a block: ``packed`` (several), ``padded`` (one, with padding on both
            sides), ``short`` (one of a few tokens) or ``whole`` (one that fills the block).
        own_student: whether the student starts from other weights than the teacher's.
        terms: further terms of the objective.
        streams: several streams, in place of the one that the other attributes describe.
        length: tokens per block.
        sizes: entries of the model's config.json that differ from those of the family.
        shard_weights: whether the weights of layers are divided over dp and cp ranks.
        depth: the layers of the models: three where one between the first and the last differs from
            both, or is fetched ahead of its use.
    """

    family: str
    mode: str
    data: str = "packed"
    rope: str = "linear"
    relations: dict = field(default_factory=lambda: {"q": 1.0, "k": 1.0, "v": 1.0}, hash=False)
    targets: tuple[str, ...] = ("q", "k", "v")
    layers: list[int] | None = field(default=None, hash=False)
    logits_kl: float = 0.0
    logits_positions: int | None = None
    dropout: float = 0.0
    own_student: bool = False
    terms: dict = field(default_factory=dict, hash=False)
    positions: str = "contiguous"
    streams: dict[str, Stream] = field(default_factory=dict, hash=False)
    length: int = LENGTH
    sizes: dict = field(default_factory=dict, hash=False)
    shard_weights: bool = False
    depth: int = 2


CASES = {
    "lora-qkvo-grouped": Case(
        "llama", "lora", relations=ALL_RELATIONS, targets=("q", "k", "v", "o")
    ),
    "lora-logits-tied": Case("llama-tied", "lora", "padded", logits_kl=0.3, logits_positions=5),
    "lora-qk-windows": Case("mistral", "lora", relations={"qk": 1.0}, targets=("q", "k"), depth=3),
    "lora-layers-mha": Case("llama-mha", "lora", "whole", "llama3", layers=[0, 1], depth=3),
    "weights-one-kv-head": Case("qwen2", "weights", relations=ALL_RELATIONS, rope="abf"),
    "weights-v-only": Case("qwen2-windows", "weights", "padded", targets=("v",)),
    "weights-own-student": Case("llama-biases", "weights", own_student=True, targets=("q", "o")),
    "all-qk-norm": Case("qwen3", "all", "padded", "longrope", relations=ALL_RELATIONS),
    "all-logits-tied": Case("llama-tied", "all", rope="yarn", logits_kl=0.5),
    "all-short-documents": Case("llama", "all", "short", relations=ALL_RELATIONS, logits_kl=0.5),
    "all-logits-biases": Case("llama-biases", "all", "padded", "yarn", logits_kl=0.5),
    "lora-context-alone": Case(
        "llama",
        "lora",
        "padded",
        relations={},
        terms={"attention_output": 1.0},
        layers=[0, 1],
        depth=3,
    ),
    # At cp > 1 some ranks have no token, and the last layer ends with its attention.
    "lora-context-short": Case(
        "llama", "lora", "short", relations={}, terms={"attention_output": 1.0}
    ),
    "lora-context-qk": Case(
        "qwen3",
        "lora",
        relations={"qk": 1.0},
        targets=("q", "k"),
        terms={"attention_output": 0.6},
        positions="skip-uniform",
    ),
    "weights-hidden": Case(
        "qwen2",
        "weights",
        "padded",
        relations={},
        terms={"hidden_cosine": 2.0, "hidden_depths": [0.34, 0.67]},
        positions="skip-gaussian",
        depth=3,
    ),
    "all-language-modelling": Case(
        "llama-biases", "all", relations={}, terms={"language_modelling": 1.0}, rope="yarn"
    ),
    "all-everything": Case(
        "llama-tied",
        "all",
        "short",
        relations=ALL_RELATIONS,
        logits_kl=0.4,
        terms={"attention_output": 0.6, "hidden_cosine": 0.7, "language_modelling": 0.3},
        depth=3,
    ),
    "all-longred": Case(
        "llama",
        "all",
        streams={
            "long": Stream({"language_modelling": 1.0}, "packed", length=48, weight=0.5),
            "short-to-long": Stream(
                {"hidden_cosine": 10.0}, "whole", "skip-gaussian", weight=0.125
            ),
            "short": Stream(
                {"hidden_cosine": 5.0, "hidden_depths": [0.3, 0.6, 1.0]}, "padded", weight=0.375
            ),
        },
        depth=3,
    ),
}

# With masters on the device, and in host memory.
DIVIDED = {
    "lora-divided": replace(CASES["lora-qkvo-grouped"], shard_weights=True),
    "all-divided": replace(CASES["all-everything"], shard_weights=True),
}

# Three tp ranks do not divide blocks of 16 tokens: the last rank has rows of padding, in which the
# biases do not vanish.
_SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
THIRDS = {
    "lora-thirds": Case(
        "llama-biases",
        "lora",
        relations=ALL_RELATIONS,
        targets=("q", "k", "v", "o"),
        length=16,
        sizes=_SIX_HEADS,
    ),
    "all-thirds": Case(
        "llama-biases",
        "all",
        "padded",
        relations=ALL_RELATIONS,
        logits_kl=0.4,
        terms={
            "attention_output": 0.6,
            "hidden_cosine": 0.7,
            "hidden_depths": [0.34, 1.0],
            "language_modelling": 0.3,
        },
        length=16,
        sizes=_SIX_HEADS,
    ),
    "weights-thirds": Case("olmo2", "weights", "whole", length=16, sizes=_SIX_HEADS),
}

DROPOUT = Case("llama", "lora", "padded", targets=("q", "k", "v", "o"), dropout=0.3)
DROPOUT_THIRDS = replace(DROPOUT, length=16, sizes=_SIX_HEADS)
ALL_CASES = {**CASES, **THIRDS, **DIVIDED, "dropout": DROPOUT, "dropout-thirds": DROPOUT_THIRDS}


def make_config(
    case: Case, folder: Path, tp: int = 1, cp: int = 1, dtype: str = "float32"
) -> Config:
    """Return the configuration of a case whose models are in ``folder``.

    AdamW's eps is as large as the gradients. With the usual 1e-8 the first update is the sign of
    the gradient, and an element whose gradient is rounding noise would move by a full step.
    """
    return Config(
        model=ModelConfig(
            teacher=str(folder / "teacher"),
            student=str(folder / "start") if case.own_student else None,
            compute_dtype=dtype,
        ),
        rope=RopeConfig(case.rope, 4.0),
        trainable=TrainableConfig(
            case.mode,
            LoraConfig(list(case.targets), rank=6, alpha=9.0, dropout=case.dropout),
            list(case.targets),
        ),
        objective=ObjectiveConfig(
            _relations(case.relations),
            case.layers,
            logits_kl=case.logits_kl,
            logits_positions=case.logits_positions,
            **case.terms,
        ),
        data=DataConfig(["unused"], context_length=case.length, positions=case.positions),
        streams={
            name: StreamConfig(
                ObjectiveConfig(_relations({}), **stream.terms),
                DataConfig(["unused"], context_length=stream.length, positions=stream.positions),
                stream.weight,
                stream.global_batch,
                MICRO_BATCH,
            )
            for name, stream in case.streams.items()
        },
        optimizer=OptimizerConfig(
            steps=10,
            learning_rate=1e-2,
            warmup_steps=2,
            eps=1e-3,
            weight_decay=0.1,
            clip=0.05,
            global_batch=GLOBAL_BATCH,
            micro_batch=MICRO_BATCH,
        ),
        parallel=ParallelConfig(
            tp,
            cp,
            activation_checkpointing=case.data != "whole",
            offload=case.data == "short",
            shard_optimizer=case.mode != "weights",
            offload_optimizer=case.data == "short",
            shard_weights=case.shard_weights,
        ),
        run=RunConfig(output="unused", seed=3),
    )


def make_models(case: Case, folder: Path) -> None:
    """Write the teacher, the student's start, and the reference's student with scaled RoPE."""
    sizes = {"num_hidden_layers": case.depth, **case.sizes}
    start = make_model(case.family, folder / "teacher", **sizes)
    if case.own_student:
        start = make_model(case.family, folder / "start", seed=1, **sizes)
    config = make_config(case, folder)
    copy_with_config(start, folder / "scaled", scaled_config(read_spec(start), config.rope, 64))


def _relations(weights: dict) -> RelationWeights:
    return RelationWeights(**{"q": 0.0, "k": 0.0, "v": 0.0, "qk": 0.0, **weights})


def streams_of(case: Case) -> dict[str, Stream]:
    """Return the case's streams. Their terms and weights are in the configuration."""
    return case.streams or {"main": Stream({}, case.data, case.positions, case.length)}


def make_block(stream: Stream, index: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return block ``index``: random tokens, int64 [length], and its document intervals."""
    random, length = np.random.default_rng(index), stream.length
    tokens = random.integers(0, 67, length)
    if stream.data == "whole":
        return tokens, [(0, length)]
    cuts = sorted({0, *random.integers(1, length, 2).tolist()})
    if stream.data == "short":
        return tokens, [(0, 3 + index % 3)]
    if stream.data == "packed":
        return tokens, list(zip(cuts, [*cuts[1:], length], strict=True))
    left, right = int(random.integers(0, 4)), length - int(random.integers(1, 8))
    return tokens, [(left, right)]


def block_number(stream: Stream, step: int, place: int) -> int:
    """Return the number of the block at a place of a step's global batch."""
    return step * stream.global_batch + place


def student_positions(stream: Stream, step: int, place: int) -> np.ndarray | None:
    """Return where the student, whose window is 4 * 64, reads a block; None for contiguous."""
    if stream.positions == "contiguous":
        return None
    middle = stream.positions.removeprefix("skip-")
    return skipped_positions(stream.length, 4 * 64, middle, (step, place))


def batch_of(stream: Stream, step: int, places: list[int]) -> Batch:
    """Return the blocks of a step's global batch at some places."""
    positions = [student_positions(stream, step, place) for place in places]
    return collate(
        [make_block(stream, block_number(stream, step, place)) for place in places],
        places,
        None if positions[0] is None else positions,
    )


def reference_batch(stream: Stream, step: int) -> ReferenceBatch:
    """Return the global batch of a step."""
    tokens, positions, skipped, documents = [], [], [], []
    for place in range(stream.global_batch):
        block, intervals = make_block(stream, block_number(stream, step, place))
        length = stream.length
        position, document = np.zeros(length, np.int64), np.full(length, -1)
        for number, (start, end) in enumerate(intervals):
            position[start:end] = np.arange(end - start)
            document[start:end] = number
        tokens.append(block)
        positions.append(position)
        other = student_positions(stream, step, place)
        skipped.append(position if other is None else other)
        documents.append(document)
    rows = (tokens, positions, skipped, documents)
    return ReferenceBatch(*(torch.from_numpy(np.stack(x)) for x in rows))


KIND_OF_MODULE = {
    **{f"{kind}_proj": kind for kind in "qkvo"},
    **{f"{name}_proj": "mlp" for name in ("gate", "up", "down", "gate_up")},
    **{"embed_tokens": "embedding", "lm_head": "head"},
}


def norms_by_kind(gradients: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the norm of all gradients of each kind; what has no other kind is a norm's weight."""
    squares: dict[str, float] = {}
    for name, gradient in gradients.items():
        kind = KIND_OF_MODULE.get(name.split(".")[-2], "norm")
        squares[kind] = squares.get(kind, 0.0) + float(gradient.square().sum())
    return {kind: math.sqrt(square) for kind, square in squares.items()}


def run_reference(case: Case, folder: Path, start: dict[str, torch.Tensor]) -> dict:
    """Return loss and gradients of the first step, and the weights after ``STEPS`` steps.

    Args:
        start: the initial value of every trained tensor by name; what it names is trained.
    """
    config = make_config(case, folder)
    trained = {k: v.double().clone().requires_grad_() for k, v in start.items()}
    trainer = ReferenceTrainer(
        str(folder / "teacher"),
        str(folder / "scaled"),
        {name: (stream.weight, stream.objective) for name, stream in config.all_streams().items()},
        trained,
        config.trainable.lora.alpha / config.trainable.lora.rank,
    )
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=settings.learning_rate,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    out: dict = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = trainer.loss(
            {name: [reference_batch(stream, step)] for name, stream in streams_of(case).items()}
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), float("inf"))
        if step == 0:
            out["loss"], out["parts"] = float(loss.detach()), dict(trainer.parts)
            out["norm"], out["layers"] = float(norm), dict(trainer.layers)
            out["kinds"] = norms_by_kind({k: v.grad for k, v in trained.items()})
            out["gradients"] = {k: v.grad.clone() for k, v in trained.items()}
            out["reached"] = trainer.reached()
        torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip)
        # Both steps are warm-up, which is linear.
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (0.5, 1.0)[step]
        optimizer.step()
    out["weights"] = {k: v.detach().clone() for k, v in trained.items()}
    return out
