"""The parity cases: what is trained, on which model, and what a step on any layout must give."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megalard.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RelationWeights,
    RopeConfig,
    RunConfig,
    TrainableConfig,
)
from megalard.data.batch import Batch, collate
from megalard.model.rope import scaled_config
from megalard.model.spec import read_spec
from tests.models import copy_with_config, make_model
from tests.reference import ReferenceBatch, ReferenceTrainer

STEPS = 3
LENGTH = 24
GLOBAL_BATCH = 4
ALL_RELATIONS = {"q": 1.0, "k": 0.5, "v": 2.0, "qk": 0.75}


@dataclass(frozen=True)
class Case:
    """One row of the parity matrix; ``data`` is packed, padded, short or whole."""

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


CASES = {
    "lora-qkvo-grouped": Case(
        "llama", "lora", relations=ALL_RELATIONS, targets=("q", "k", "v", "o")
    ),
    "lora-logits-tied": Case("llama-tied", "lora", "padded", logits_kl=0.3, logits_positions=5),
    "lora-qk-windows": Case("mistral", "lora", relations={"qk": 1.0}, targets=("q", "k")),
    "lora-layers-mha": Case("llama-mha", "lora", "whole", "llama3", layers=[0, 1]),
    "weights-one-kv-head": Case("qwen2", "weights", relations=ALL_RELATIONS, rope="abf"),
    "weights-v-only": Case("qwen2-windows", "weights", "padded", targets=("v",)),
    "weights-own-student": Case("llama-biases", "weights", own_student=True, targets=("q", "o")),
    "all-qk-norm": Case("qwen3", "all", "padded", "longrope", relations=ALL_RELATIONS),
    "all-logits-tied": Case("llama-tied", "all", rope="yarn", logits_kl=0.5),
    "all-short-documents": Case("llama", "all", "short", relations=ALL_RELATIONS, logits_kl=0.5),
    "all-logits-biases": Case("llama-biases", "all", "padded", "yarn", logits_kl=0.5),
}

DROPOUT = Case("llama", "lora", "padded", targets=("q", "k", "v", "o"), dropout=0.3)
ALL_CASES = {**CASES, "dropout": DROPOUT}

# one of each training mode, with grouped heads, K/V heads fewer than tp, and tied embeddings
CORE = ["lora-qkvo-grouped", "weights-one-kv-head", "all-logits-tied", "all-short-documents"]


def make_config(
    case: Case, folder: Path, tp: int = 1, cp: int = 1, dtype: str = "float32"
) -> Config:
    """The configuration of a case whose models lie in ``folder``.

    AdamW's eps is of the size of the gradients: with the usual 1e-8 the first update is the
    gradient's sign, and an element whose gradient is rounding noise would move by a whole step.
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
            RelationWeights(**{"q": 0.0, "k": 0.0, "v": 0.0, "qk": 0.0, **case.relations}),
            case.layers,
            case.logits_kl,
            case.logits_positions,
        ),
        data=DataConfig(["unused"], context_length=LENGTH),
        optimizer=OptimizerConfig(
            steps=10,
            learning_rate=1e-2,
            warmup_steps=2,
            eps=1e-3,
            weight_decay=0.1,
            clip=0.05,
            global_batch=GLOBAL_BATCH,
        ),
        parallel=ParallelConfig(
            tp, cp, activation_checkpointing=case.data != "whole", offload=case.data == "short"
        ),
        run=RunConfig(output="unused", seed=3),
    )


def make_models(case: Case, folder: Path) -> None:
    """Teacher, the student's starting point, and the reference's student with scaled RoPE."""
    teacher = make_model(case.family, folder / "teacher")
    start = make_model(case.family, folder / "start", seed=1) if case.own_student else teacher
    config = make_config(case, folder)
    copy_with_config(start, folder / "scaled", scaled_config(read_spec(start), config.rope, 64))


def make_block(case: Case, index: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Block ``index``: int64 [LENGTH] random tokens and its document intervals."""
    random = np.random.default_rng(index)
    tokens = random.integers(0, 67, LENGTH)
    if case.data == "whole":
        return tokens, [(0, LENGTH)]
    cuts = sorted({0, *random.integers(1, LENGTH, 2).tolist()})
    if case.data == "short":
        return tokens, [(0, 3 + index % 3)]
    if case.data == "packed":
        return tokens, list(zip(cuts, [*cuts[1:], LENGTH], strict=True))
    left, right = int(random.integers(0, 4)), LENGTH - int(random.integers(1, 8))
    return tokens, [(left, right)]


def step_blocks(step: int) -> range:
    """The block numbers of a step's global batch."""
    return range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)


def batch_of(case: Case, step: int, places: list[int]) -> Batch:
    """The rows of a step's global batch at ``places``."""
    blocks = step_blocks(step)
    return collate([make_block(case, blocks[place]) for place in places], places)


def reference_batch(case: Case, step: int) -> ReferenceBatch:
    tokens, positions, documents = [], [], []
    for index in step_blocks(step):
        block, intervals = make_block(case, index)
        position, document = np.zeros(LENGTH, np.int64), np.full(LENGTH, -1)
        for number, (start, end) in enumerate(intervals):
            position[start:end] = np.arange(end - start)
            document[start:end] = number
        tokens.append(block)
        positions.append(position)
        documents.append(document)
    return ReferenceBatch(*(torch.from_numpy(np.stack(x)) for x in (tokens, positions, documents)))


def run_reference(case: Case, folder: Path, start: dict[str, torch.Tensor]) -> dict:
    """Loss and gradients of the first step, and the weights after ``STEPS`` steps.

    Args:
        start: every trained tensor's initial value, whose names say what is trained.
    """
    config = make_config(case, folder)
    trained = {k: v.double().clone().requires_grad_() for k, v in start.items()}
    trainer = ReferenceTrainer(
        str(folder / "teacher"),
        str(folder / "scaled"),
        case.relations,
        trained,
        case.layers,
        config.trainable.lora.alpha / config.trainable.lora.rank,
        case.logits_kl,
        case.logits_positions,
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
        loss = trainer.loss([reference_batch(case, step)])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), float("inf"))
        if step == 0:
            out["loss"], out["parts"] = float(loss.detach()), dict(trainer.parts)
            out["norm"] = float(norm)
            out["gradients"] = {k: v.grad.clone() for k, v in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip)
        # two steps of linear warm-up, then the start of a cosine from 1 to 0.9 over eight steps
        rates = (0.5, 1.0, 0.9 + 0.1 * 0.5 * (1 + np.cos(np.pi / 8)))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rates[step]
        optimizer.step()
    out["weights"] = {k: v.detach().clone() for k, v in trained.items()}
    return out
