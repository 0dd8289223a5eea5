"""Going on with a run: is the output directory's the same one, and where did it stop?"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from megalard.checkpoint.provenance import Origins
from megalard.checkpoint.sharded.manifest import Manifest, read_manifest, written_by
from megalard.checkpoint.sharded.save_load import ShardedWeights
from megalard.config.schema import Config, to_dict
from megalard.data.loader import BatchLoader, StreamLoaders
from megalard.data.token_store import TokenStore
from megalard.errors import UserError
from megalard.parallel.agreement import checked_meanwhile, checked_on_all_ranks, gather_objects
from megalard.parallel.mesh import Axis, Mesh
from megalard.training.run_folder import checkpoints, unfinished
from megalard.training.state import optimizer_settings, restore_state
from megalard.training.step import Distiller

# What may differ between a run and its resumption. The models and the text are compared by their
# checksums, so that they may have moved; a RoPE table by what it gives.
_MAY_DIFFER = (
    "parallel.",
    "checkpoint.",
    "evaluation.",
    "run.output",
    "run.device",
    "run.deterministic",
    "run.log_every",
    "run.non_finite",
    "data.paths",
    "data.cache",
    "optimizer.micro_batch",
    "micro_batch",
    "model.teacher",
    "model.student",
    "model.tokenizer",
    "rope.table",
)


@dataclass(frozen=True)
class Output:
    """The output directory as a run finds it.

    Attributes:
        directory: run.output.
        fresh: whether it was empty, so that bad input may empty it again.
        checkpoint: the newest complete checkpoint, to go on from.
    """

    directory: Path
    fresh: bool = True
    checkpoint: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.directory / "checkpoints"


def find_output(config: Config, mesh: Mesh) -> Output:
    """What run.output holds; a collective call, in which rank 0 looks.

    Raises:
        UserError: on every rank, when it holds anything but this run, or its newest checkpoint is
            damaged.
    """
    found = None
    with checked_on_all_ranks(mesh.world):
        if mesh.world.rank == 0:
            found = _look(config, Path(config.run.output))
    return gather_objects(found, mesh.world)[0]


def _look(config: Config, directory: Path) -> Output:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return Output(directory)
    if not directory.is_dir():
        raise UserError(f"run.output {directory} is a file: choose a directory")
    taken = UserError(f"run.output {directory} is not empty: choose another directory")
    output = Output(directory, fresh=False)
    saved = checkpoints(output.checkpoints)
    if saved:
        path = saved[-1][1]
        with _naming_older(path):
            manifest = read_manifest(path)
        if manifest.kind != "training":
            raise UserError(
                f"{path} is a whole model and no checkpoint of a run: move it out of "
                f"{output.checkpoints}"
            )
        _compare(manifest.training["config"], to_dict(config), directory)
        return Output(directory, False, path)
    # stopped before its first checkpoint: the same command starts again
    started = directory / "run.json"
    exported = (directory / "student").exists() or any(directory.glob("step-*"))
    if started.is_file() and exported:
        raise UserError(
            f"run.output {directory} holds a run that has exported its student and has no "
            "checkpoint to go on from: choose another directory"
        )
    if started.is_file():
        try:
            text = started.read_text()
            if text:  # else it was stopped before it wrote that
                _compare(json.loads(text), to_dict(config), directory)
        except (OSError, ValueError):
            raise taken from None
        return output
    raise taken


@contextmanager
def _naming_older(checkpoint: Path) -> Iterator[None]:
    """Say of a damaged checkpoint which older one there is to go on from."""
    try:
        yield
    except UserError as error:
        saved = [path for _, path in checkpoints(checkpoint.parent)]
        older = list(takewhile(lambda path: path != checkpoint, saved))
        hint = f"; remove {checkpoint} to go on from {older[-1].name}" if older else ""
        raise type(error)(f"{error}{hint}") from None


def _compare(theirs: dict, ours: dict, directory: Path) -> None:
    theirs, ours = _flat(theirs), _flat(ours)
    for key in sorted(theirs.keys() ^ ours.keys()):
        if key.startswith("streams."):
            raise UserError(
                f"run.output {directory} holds a run with other streams (of these two, one has "
                f"{key}): choose another directory, or set it back to resume that run"
            )
    for key in sorted(theirs.keys() & ours.keys()):
        # a stream's keys are judged as the sections' of that name
        general = re.sub(r"^streams\.[^.]+\.(?=data\.)|^streams\.[^.]+\.(?=micro_)", "", key)
        if theirs[key] != ours[key] and not general.startswith(_MAY_DIFFER):
            raise UserError(
                f"run.output {directory} holds a run with {key} {theirs[key]}, not {ours[key]}: "
                "choose another directory, or set it back to resume that run"
            )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def resume(
    output: Output,
    distiller: Distiller,
    origins: Origins,
    stores: dict[str, TokenStore],
    axis: Axis,
) -> tuple[int, dict | None]:
    """Bring a new run to where the output's checkpoint stopped; a collective call.

    Returns:
        The steps done (0 for a new run), and what the next checkpoint will note of the models.

    Raises:
        UserError: on every rank, when the checkpoint, the base model, the teacher or the text is
            damaged or not what it was.
    """
    leftovers = unfinished(output.checkpoints) if axis.rank == 0 else []
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
        how = "cannot be removed" if path.exists() else "removed"
        print(f"{path} is a save that was not finished: {how}", flush=True)
    if output.checkpoint is None:
        if not output.fresh and axis.rank == 0:
            print(f"{output.directory} holds no complete checkpoint: from the start", flush=True)
        return 0, None
    with checked_on_all_ranks(axis):
        with _naming_older(output.checkpoint):
            weights = ShardedWeights(output.checkpoint)
        manifest = weights.manifest
        _check_data(manifest, stores)
        _check_student(manifest, distiller.student.decoder.spec.hf_config)

    def check() -> None:
        with _naming_older(output.checkpoint):
            weights.check_sums(axis)
        origins.check(manifest, axis)

    with checked_meanwhile(check, axis) as wait_for_checksums:
        with _naming_older(output.checkpoint):
            restore_state(distiller, weights, axis)
        wait_for_checksums()
    step = manifest.training["step"]
    if axis.rank == 0:
        print(f"resuming from {output.checkpoint} after step {step}", flush=True)
    return step, origins.describe_checked(manifest)


def _check_student(manifest: Manifest, config: dict) -> None:
    """Refuse another student, such as one with a changed table of inverse frequencies."""
    ours = json.loads(json.dumps(config))
    for key in sorted(ours.keys() | manifest.config.keys()):
        if ours.get(key) != manifest.config.get(key):
            raise UserError(
                f"the student's {key} is not what {manifest.directory} was trained with: restore "
                "the model's config.json and rope.table, or choose another run.output"
            )


def _check_data(manifest: Manifest, stores: dict[str, TokenStore]) -> None:
    for name, store in stores.items():
        theirs, ours = manifest.training["data"][name], _data(store)
        for key, value in ours.items():
            if theirs[key] != value:
                of = f" of stream {name}" if len(stores) > 1 else ""
                raise UserError(
                    f"the text{of} is not the one {manifest.directory} was trained on (its {key} "
                    f"is {value}, then {theirs[key]}): restore data.paths, or choose another "
                    "run.output"
                )


def _data(store: TokenStore) -> dict:
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
    """The manifest's sections after ``step`` steps, but for the models'."""
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
                name: {**_data(stores[name]), **_position(loader, step)}
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


def _position(loader: BatchLoader, step: int) -> dict:
    """How far a stream has been read after ``step`` steps."""
    blocks, read = len(loader.blocks), step * loader.global_batch
    return {
        "blocks": blocks,
        "blocks_read": read,
        "next_block": read % blocks,
        "epoch": read // blocks,
    }
