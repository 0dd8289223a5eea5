"""Rules between settings: what can be checked of a configuration without the model or the text.

The range of a single setting is stated at its field; see ``megalard.config.fields``.
"""

from __future__ import annotations

from megalard.config.fields import check_fields
from megalard.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    RopeConfig,
    StreamConfig,
)
from megalard.errors import UserError


def validate(config: Config, has_files: bool = True) -> None:
    """Check every setting against its range and against the other settings.

    Args:
        has_files: whether model, text and output directory must be named, as for a run.

    Raises:
        UserError: a value is not allowed; the message names the key, the value and the fix.
    """
    _require(
        config.rope.type != "dynamic",
        "rope.type 'dynamic' equals the teacher's RoPE at up to M tokens, so there is nothing to "
        "restore; use linear, abf, yarn, llama3, longrope or table",
    )
    check_fields(config, has_files=has_files)
    _check_rope(config.rope, config.model)
    for stage, stage_config in config.all_stages().items():
        prefix = f"stages.{stage}." if config.stages else ""
        for name, stream in stage_config.all_streams().items():
            _check_stream(prefix, name if stage_config.streams else None, stream, has_files)
    _check_stages(config)
    _check_parallel(config)
    _check_checkpoint(config.checkpoint)
    _check_evaluation(config)
    beyond = [step for step in config.run.profile if step > config.steps]
    _require(
        not beyond,
        f"run.profile names step {max(beyond, default=0)}, but the run has {config.steps} steps: "
        "leave it out",
    )


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def _check_rope(rope: RopeConfig, model: ModelConfig) -> None:
    for key, rope_type in (("theta", "abf"), ("long_factors", "longrope"), ("table", "table")):
        is_given = getattr(rope, key) is not None
        _require(
            not is_given or rope.type == rope_type,
            f"rope.{key} only applies to rope.type {rope_type}, not to {rope.type}: leave it out",
        )
    _require(
        rope.type != "table" or rope.table is not None,
        "rope.type table needs rope.table FILE, the file with the inverse frequencies",
    )
    _require(
        rope.type != "checkpoint" or model.student is not None,
        "rope.type checkpoint needs model.student, the checkpoint whose RoPE is kept",
    )


def _check_data(prefix: str, data: DataConfig) -> None:
    _require(
        data.weights is None or len(data.weights) == len(data.paths) or not data.paths,
        f"{prefix}data.weights has {len(data.weights or ())} numbers, but {prefix}data.paths names "
        f"{len(data.paths)}: give one weight for each path",
    )
    _require(
        data.end_token is None or data.eos == "yes",
        f"{prefix}data.end_token is given, so {prefix}data.eos must be yes, not {data.eos}",
    )
    _require(
        not (data.drop_tails and data.packing),
        f"{prefix}data.drop_tails is true, so {prefix}data.packing must be false: packing leaves "
        "no tails",
    )


def _check_stages(config: Config) -> None:
    before = None
    last = list(config.stages)[-1:]
    for name, stage in config.stages.items():
        _require(
            not stage.keep_optimizer or (before is not None and stage.trainable == before),
            f"stages.{name}.keep_optimizer is true, so the stage must come after a stage with the "
            "same trainable section",
        )
        _require(
            not (stage.export and [name] == last),
            f"stages.{name}.export is true, but the student that the last stage leaves is saved in "
            "any case: leave it out",
        )
        before = stage.trainable


def _check_stream(prefix: str, name: str | None, stream: StreamConfig, has_files: bool) -> None:
    """Check one stream; ``name`` is None for the stream of the sections objective and data."""
    prefix += "" if name is None else f"streams.{name}."
    _require(
        bool(stream.data.paths) or not has_files,
        f"{prefix}data.paths is not set: give text files or directories",
    )
    _check_data(prefix, stream.data)
    _require(
        bool(stream.objective.active_terms()),
        f"{prefix}objective is empty: give relations, "
        "attention_output, hidden_cosine, logits_kl or language_modelling a weight",
    )


def _check_parallel(config: Config) -> None:
    parallel = config.parallel
    modes = [stage.trainable.mode for stage in config.all_stages().values()]
    _require(
        not parallel.shard_weights
        or parallel.shard_optimizer
        or parallel.offload_optimizer
        or set(modes) == {"lora"},
        "parallel.shard_weights divides trained weights as parallel.shard_optimizer divides their "
        "fp32 values, and parallel.shard_optimizer is false: leave one of them out",
    )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    keep, save = checkpoint.keep_every, checkpoint.save_every
    _require(
        not keep or (save > 0 and keep % save == 0),
        f"checkpoint.keep_every {keep} must be a multiple of checkpoint.save_every {save}",
    )
    _require(
        checkpoint.export_rounding == "nearest" or checkpoint.export_dtype != "float32",
        f"checkpoint.export_rounding {checkpoint.export_rounding} rounds to 16 bits, and "
        "checkpoint.export_dtype is float32: leave one of them out",
    )


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    for key, is_given in (
        (f"evaluation.patience {evaluation.patience}", evaluation.patience > 0),
        ("checkpoint.keep_best true", config.checkpoint.keep_best),
    ):
        _require(
            not is_given or evaluation.every > 0,
            f"{key} compares validations, and evaluation.every is 0: give the number of steps "
            "between validations",
        )
    _require(
        evaluation.best == "gap_restored" or config.keeps_best,
        f"evaluation.best {evaluation.best} chooses the student to keep, and none is kept: set "
        "checkpoint.keep_best true or evaluation.patience",
    )
