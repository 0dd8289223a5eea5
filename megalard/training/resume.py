"""Resume a run from a checkpoint, and describe a run in the manifest of a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megalard.checkpoint.sharded.manifest import Manifest, naming_bad_entries, written_by
from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.config.schema import Config, to_dict
from megalard.data.loader import StreamLoaders
from megalard.data.token_store import TokenStore
from megalard.errors import UserError
from megalard.model.spec import ModelSpec, spec_from_config
from megalard.parallel.agreement import checked_meanwhile, checked_on_all_ranks
from megalard.parallel.mesh import Axis
from megalard.reporter import Reporter
from megalard.training.origins import Origins
from megalard.training.output import Output, naming_older_checkpoint
from megalard.training.plan import Plan
from megalard.training.run_folder import unfinished, unfinished_exports
from megalard.training.stages import Stage, data_key
from megalard.training.state import OPTIMIZER_CLASS, optimizer_settings, restore_state
from megalard.training.step import Distiller
from megalard.training.streams import Stores


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        steps: the number of steps taken, over all stages.
        skipped: how many of them changed nothing.
        validations: the validations so far, as ``Validator.state`` describes them; None if there
            are none.
    """

    steps: int = 0
    skipped: int = 0
    validations: dict | None = None


def open_checkpoint(output: Output, plan: Plan, axis: Axis, reporter: Reporter) -> Progress:
    """Return the progress of the output's checkpoint, or of a new run; a collective call.

    Saves and periodic exports that were not finished are removed.

    Raises:
        UserError: on every rank, if the checkpoint is of another student.
    """
    if axis.rank == 0:
        _remove("a save", unfinished(output.checkpoints), reporter)
        _remove("an export", unfinished_exports(output.directory), reporter)
    if output.checkpoint is None:
        if not output.is_new:
            reporter.line(
                f"{output.directory} holds no complete checkpoint: the run begins at the start"
            )
        return Progress()
    with checked_on_all_ranks(axis):
        with naming_older_checkpoint(output.checkpoint):
            manifest = ShardedWeights(output.checkpoint).manifest
        with naming_bad_entries(manifest):
            _check_student(manifest, plan.student)
    # Earlier versions did not count the skipped steps, and made no validations.
    training = manifest.training
    return Progress(training["step"], training.get("skipped", 0), training.get("validations"))


def _remove(kind: str, paths: list[Path], reporter: Reporter) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        outcome = "it cannot be removed" if path.exists() else "it was removed"
        reporter.line(f"{path} is {kind} that was not finished: {outcome}")


def restore(
    output: Output,
    distiller: Distiller,
    origins: Origins,
    stages: Sequence[Stage],
    stores: Stores,
    axis: Axis,
    reporter: Reporter,
) -> dict | None:
    """Load the output's checkpoint, if there is one, into the stage it belongs to.

    Returns:
        The sections ``base`` and ``teacher`` for the manifests of later checkpoints; None if the
        files of the models have not been read.

    Raises:
        UserError: on every rank, if the checkpoint, a model or the text is damaged or has changed.
    """
    if output.checkpoint is None:
        return None
    with checked_on_all_ranks(axis):
        with naming_older_checkpoint(output.checkpoint):
            weights = ShardedWeights(output.checkpoint)
        with naming_bad_entries(weights.manifest):
            _check_data(weights.manifest, stages, stores)

    def check() -> None:
        with naming_older_checkpoint(output.checkpoint):
            weights.check_sums(axis)
        origins.check(weights.manifest, axis)

    with checked_meanwhile(check, axis) as wait_for_checksums:
        with naming_older_checkpoint(output.checkpoint):
            restore_state(distiller, weights, axis)
        wait_for_checksums()
    reporter.line(
        f"resuming from {output.checkpoint} after step {weights.manifest.training['step']}"
    )
    return origins.checked_sections(weights.manifest)


def restore_step(distiller: Distiller, checkpoint: Path, axis: Axis) -> None:
    """Replace the state of a run by that of an earlier checkpoint of its stage; a collective call.

    Raises:
        UserError: on every rank, if the checkpoint is damaged.
    """
    with checked_on_all_ranks(axis):
        weights = ShardedWeights(checkpoint)
        weights.check_sums(axis)
    distiller.optimizer.state.clear()  # before the memory of another state is needed
    restore_state(distiller, weights, axis)


def _check_student(manifest: Manifest, student: ModelSpec) -> None:
    """Refuse another student, such as a student with another table of inverse frequencies."""
    saved = spec_from_config(manifest.config, str(manifest.directory))
    for field in fields(ModelSpec):
        current = getattr(student, field.name)
        if field.name != "hf_config" and current != getattr(saved, field.name):
            raise UserError(
                f"the student's {field.name} is not what {manifest.directory} was trained with: "
                "restore the model's config.json and rope.table, or choose another run.output"
            )


def _check_data(manifest: Manifest, stages: Sequence[Stage], stores: Stores) -> None:
    for stage in stages:
        for name, store in stores[stage.name].items():
            saved, current = manifest.training["data"][data_key(stage, name)], _identity(store)
            for key, value in current.items():
                # Earlier versions identified a text by its files.
                accepted = (value, store.source_files) if key == "sources" else (value,)
                if saved[key] not in accepted:
                    stream = (
                        f" of {data_key(stage, name)}" if len(manifest.training["data"]) > 1 else ""
                    )
                    raise UserError(
                        f"the text{stream} is not the text {manifest.directory} was trained on "
                        f"(its {key} is {value}, and was {saved[key]}): restore data.paths, or "
                        "choose another run.output"
                    )


def _identity(store: TokenStore) -> dict:
    return {
        "tokens": len(store.tokens),
        "tokenizer": store.tokenizer_fingerprint,
        "sources": store.sources_fingerprint,
    }


def describe_run(
    config: Config,
    stage: Stage,
    distiller: Distiller,
    student_config: dict,
    stores: Stores,
    loaders: Mapping[str, StreamLoaders],
    stages: Sequence[Stage],
    progress: Progress,
) -> dict:
    """Return the manifest's sections after some steps, except those of the models.

    Args:
        config: the configuration of the run.
        stage: the stage of the last step.
        loaders: the loaders of each stage, by its name.
        progress: what the run has done.
    """
    student = distiller.student
    slices, trainable = student.decoder.slices, stage.config.trainable
    lora = {
        "rank": trainable.lora.rank,
        "alpha": trainable.lora.alpha,
        "dropout": trainable.lora.dropout,
        "targets": trainable.lora.targets,
    }
    data, step = {}, progress.steps
    for other in stages:
        steps_done = min(max(step, other.steps_before), other.last_step) - other.steps_before
        for name, loader in loaders[other.name].loaders.items():
            position = loader.position_after(steps_done)
            data[data_key(other, name)] = {**_identity(stores[other.name][name]), **position}
    return {
        "kind": "training",
        "config": student_config,
        "trained": {
            "mode": trainable.mode,
            "lora": lora if trainable.mode == "lora" else None,
            "tensors": {name: list(slices[name].full_shape) for name in student.changed},
        },
        "training": {
            "step": step,
            "skipped": progress.skipped,
            "validations": progress.validations,
            "stage": stage.name,
            "seed": config.run.seed,
            "data": data,
            "optimizer": {
                "class": OPTIMIZER_CLASS,
                "groups": optimizer_settings(distiller.optimizer),
            },
            "config": to_dict(config),
        },
        "written_by": written_by(distiller.mesh),
    }
