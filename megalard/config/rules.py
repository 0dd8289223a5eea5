"""What can be checked of a configuration without the model or the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megalard.errors import UserError

if TYPE_CHECKING:
    from megalard.config.schema import Config, StreamConfig

RELATIONS = ("q", "k", "v", "qk")
PROJECTIONS = ("q", "k", "v", "o")
POSITIONS = ("contiguous", "skip-gaussian", "skip-uniform")
_TERMS = ("attention_context", "hidden_cosine", "logits_kl", "language_modelling")
ROPE_TYPES = ("linear", "abf", "yarn", "llama3", "longrope", "table", "checkpoint")


def require(condition: bool, sentence: str) -> None:
    """Raise a ``UserError`` of this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def choice(key: str, value, allowed) -> None:
    require(value in allowed, f"{key} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def at_least(key: str, value, low) -> None:
    require(value >= low, f"{key} must be at least {low}; got {value}")


def validate(config: Config) -> None:
    """Check every value of a configuration against its range and against the others.

    Raises:
        UserError: naming the key, the value and what it may be.
    """
    model, rope, trainable = config.model, config.rope, config.trainable
    require(
        bool(model.teacher), "model.teacher is not set: give the teacher's Hugging Face directory"
    )
    require(bool(config.run.output), "run.output is not set: give the output directory")
    choice("model.compute_dtype", model.compute_dtype, ("bfloat16", "float32"))
    if model.native_context is not None:
        at_least("model.native_context", model.native_context, 1)

    require(
        rope.type != "dynamic",
        "rope.type 'dynamic' equals the teacher's RoPE at up to M tokens, so there is nothing to "
        "restore; use linear, abf, yarn, llama3, longrope or table",
    )
    choice("rope.type", rope.type, ROPE_TYPES)
    require(
        1 < rope.factor < float("inf"), f"rope.factor must be greater than 1; got {rope.factor}"
    )
    require(
        rope.theta is None or 0 < rope.theta < float("inf"),
        f"rope.theta must be positive; got {rope.theta}",
    )
    for key, kind in (("theta", "abf"), ("long_factors", "longrope"), ("table", "table")):
        given = getattr(rope, key) is not None
        require(not given or rope.type == kind, f"rope.{key} only applies to rope.type {kind}")
    require(rope.type != "table" or rope.table is not None, "rope.type table needs rope.table FILE")
    require(
        rope.type != "checkpoint" or model.student is not None,
        "rope.type checkpoint needs model.student, the checkpoint whose RoPE is kept",
    )

    choice("trainable.mode", trainable.mode, ("lora", "weights", "all"))
    for key, targets in (("lora.targets", trainable.lora.targets), ("weights", trainable.weights)):
        require(bool(targets), f"trainable.{key} is empty: choose from {', '.join(PROJECTIONS)}")
        require(len(set(targets)) == len(targets), f"trainable.{key} names one twice: {targets}")
        for target in targets:
            choice(f"trainable.{key}", target, PROJECTIONS)
    at_least("trainable.lora.rank", trainable.lora.rank, 1)
    require(
        0 <= trainable.lora.dropout < 1,
        f"trainable.lora.dropout must be in [0, 1); got {trainable.lora.dropout}",
    )

    require(
        0 < trainable.lora.alpha < float("inf"),
        f"trainable.lora.alpha must be positive; got {trainable.lora.alpha}",
    )
    for name, stream in config.all_streams().items():
        _validate_stream(name if config.streams else None, stream)
    optimizer = config.optimizer
    for key in ("steps", "global_batch", "micro_batch"):
        at_least(f"optimizer.{key}", getattr(optimizer, key), 1)
    for key in ("warmup_steps", "weight_decay", "clip", "eps"):
        at_least(f"optimizer.{key}", getattr(optimizer, key), 0)
    require(
        0 < optimizer.learning_rate < float("inf"),
        f"optimizer.learning_rate must be positive; got {optimizer.learning_rate}",
    )
    require(
        0 <= optimizer.min_ratio <= 1,
        f"optimizer.min_ratio must be in [0, 1]; got {optimizer.min_ratio}",
    )
    require(
        len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas),
        f"optimizer.betas must be two numbers in [0, 1); got {optimizer.betas}",
    )
    at_least("parallel.tp", config.parallel.tp, 1)
    at_least("parallel.cp", config.parallel.cp, 1)

    evaluation = config.evaluation
    if evaluation.lengths is not None:
        require(
            bool(evaluation.lengths) and min(evaluation.lengths) >= 2,
            f"evaluation.lengths must be at least 2 tokens each; got {evaluation.lengths}",
        )
    at_least("evaluation.max_tokens", evaluation.max_tokens, 2)
    choice("run.device", config.run.device, ("auto", "cpu", "cuda"))
    choice("run.non_finite", config.run.non_finite, ("stop", "skip"))
    at_least("run.log_every", config.run.log_every, 1)
    for key in ("save_every", "keep_every", "export_every"):
        at_least(f"checkpoint.{key}", getattr(config.checkpoint, key), 0)
    at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    keep, every = config.checkpoint.keep_every, config.checkpoint.save_every
    require(
        not keep or (every and keep % every == 0),
        f"checkpoint.keep_every {keep} must be a multiple of checkpoint.save_every {every}",
    )


def _validate_stream(name: str | None, stream: StreamConfig) -> None:
    """Check one stream; ``name`` is None for the one that has no section of its own."""
    prefix = "" if name is None else f"streams.{name}."
    if name is not None:
        allowed = name.replace("-", "").replace("_", "").isalnum()
        require(allowed, f"the stream name '{name}' may have letters, digits, - and _ only")
        at_least(f"{prefix}global_batch", stream.global_batch, 1)
        at_least(f"{prefix}micro_batch", stream.micro_batch, 1)
        require(
            0 < stream.weight < float("inf"),
            f"{prefix}weight must be positive; got {stream.weight}",
        )
    data, objective = stream.data, stream.objective
    require(bool(data.paths), f"{prefix}data.paths is not set: give text files or directories")
    at_least(f"{prefix}data.context_length", data.context_length, 2)
    choice(f"{prefix}data.positions", data.positions, POSITIONS)
    for key, value in (
        *((f"relations.{name}", getattr(objective.relations, name)) for name in RELATIONS),
        *((term, getattr(objective, term)) for term in _TERMS),
    ):
        require(
            value < float("inf"), f"{prefix}objective.{key} must be a finite number; got {value}"
        )
        at_least(f"{prefix}objective.{key}", value, 0)
    require(
        objective.needs_teacher or objective.language_modelling > 0,
        f"the objective{'' if name is None else f' of stream {name}'} is empty: give at least one "
        f"of {', '.join(('relations', *_TERMS))} a weight",
    )
    if objective.layers is not None:
        key = f"{prefix}objective.layers"
        require(bool(objective.layers), f"{key} is empty: leave it out for every layer")
        require(
            len(set(objective.layers)) == len(objective.layers) and min(objective.layers) >= 0,
            f"{key} must be different numbers from 0; got {objective.layers}",
        )
    depths = objective.hidden_depths
    require(
        bool(depths) and len(set(depths)) == len(depths) and all(0 < d <= 1 for d in depths),
        f"{prefix}objective.hidden_depths must be different shares in (0, 1]; got {depths}",
    )
    if objective.logits_positions is not None:
        at_least(f"{prefix}objective.logits_positions", objective.logits_positions, 1)
