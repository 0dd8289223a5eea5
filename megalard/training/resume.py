"""Resume a run from a checkpoint, and describe a run in the manifest of a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import fields

from megalard.checkpoint.sharded.manifest import Manifest, written_by
from megalard.checkpoint.sharded.save_load import ShardedWeights
from megalard.config.schema import to_dict
from megalard.data.loader import StreamLoaders
from megalard.data.token_store import TokenStore
from megalard.errors import UserError
from megalard.model.spec import ModelSpec, spec_from_config
from megalard.parallel.agreement import checked_meanwhile, checked_on_all_ranks
from megalard.parallel.mesh import Axis
from megalard.reporter import Reporter
from megalard.training.origins import Origins
from megalard.training.output import Output, naming_older_checkpoint
from megalard.training.run_folder import unfinished
from megalard.training.state import optimizer_settings, restore_state
from megalard.training.step import Distiller


def resume(
    output: Output,
    distiller: Distiller,
    origins: Origins,
    stores: dict[str, TokenStore],
    axis: Axis,
    reporter: Reporter,
) -> tuple[int, dict | None]:
    """Restore the state of the output's checkpoint, if there is one; a collective call.

    Returns:
        The number of steps that are done (0 for a new run), and what the next checkpoint notes of
        the models (None if their files have not been read).

    Raises:
        UserError: on every rank, if the checkpoint, a model or the text is damaged or has changed.
    """
    for path in unfinished(output.checkpoints) if axis.rank == 0 else ():
        shutil.rmtree(path, ignore_errors=True)
        outcome = "it cannot be removed" if path.exists() else "it was removed"
        reporter.line(f"{path} is a save that was not finished: {outcome}")
    if output.checkpoint is None:
        if not output.is_new:
            reporter.line(
                f"{output.directory} holds no complete checkpoint: the run begins at the start"
            )
        return 0, None
    with checked_on_all_ranks(axis):
        with naming_older_checkpoint(output.checkpoint):
            weights = ShardedWeights(output.checkpoint)
        manifest = weights.manifest
        _check_data(manifest, stores)
        _check_student(manifest, distiller.student.decoder.spec)

    def check() -> None:
        with naming_older_checkpoint(output.checkpoint):
            weights.check_sums(axis)
        origins.check(manifest, axis)

    with checked_meanwhile(check, axis) as wait_for_checksums:
        with naming_older_checkpoint(output.checkpoint):
            restore_state(distiller, weights, axis)
        wait_for_checksums()
    step = manifest.training["step"]
    reporter.line(f"resuming from {output.checkpoint} after step {step}")
    return step, origins.checked_sections(manifest)


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


def _check_data(manifest: Manifest, stores: dict[str, TokenStore]) -> None:
    for name, store in stores.items():
        saved, current = manifest.training["data"][name], _identity(store)
        for key, value in current.items():
            if saved[key] != value:
                stream = f" of stream {name}" if len(stores) > 1 else ""
                raise UserError(
                    f"the text{stream} is not the text {manifest.directory} was trained on (its "
                    f"{key} is {value}, and was {saved[key]}): restore data.paths, or choose "
                    "another run.output"
                )


def _identity(store: TokenStore) -> dict:
    return {
        "tokens": len(store.tokens),
        "tokenizer": store.tokenizer_fingerprint,
        "sources": store.sources_fingerprint,
    }


def describe_run(
    distiller: Distiller,
    student_config: dict,
    stores: dict[str, TokenStore],
    loaders: StreamLoaders,
    step: int,
) -> dict:
    """Return the manifest's sections after ``step`` steps, except those of the models."""
    config, layouts = distiller.config, distiller.student.decoder.layouts
    trainable = config.trainable
    lora = {
        "rank": trainable.lora.rank,
        "alpha": trainable.lora.alpha,
        "dropout": trainable.lora.dropout,
        "targets": trainable.lora.targets,
    }
    return {
        "kind": "training",
        "config": student_config,
        "trained": {
            "mode": trainable.mode,
            "lora": lora if trainable.mode == "lora" else None,
            "tensors": {name: list(layouts[name].full_shape) for name in distiller.student.trained},
        },
        "training": {
            "step": step,
            "seed": config.run.seed,
            "data": {
                name: {**_identity(stores[name]), **loader.position_after(step)}
                for name, loader in loaders.loaders.items()
            },
            "optimizer": {
                "class": type(distiller.optimizer).__name__,
                "groups": optimizer_settings(distiller.optimizer),
            },
            "config": to_dict(config),
        },
        "written_by": written_by(distiller.mesh),
    }
