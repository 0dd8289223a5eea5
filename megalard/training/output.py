"""The output directory: whether a run may use it, and which checkpoint the run resumes from."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from secrets import token_hex
from typing import IO

import torch.distributed as dist

from megalard.checkpoint.sharded.manifest import check_run, naming_bad_entries, read_manifest
from megalard.config.file import in_present_spelling, recorded_config
from megalard.config.schema import Config, to_dict
from megalard.errors import UserError, shown
from megalard.files.locks import hold_lock
from megalard.files.reading import read_json
from megalard.files.writing import replace_text
from megalard.parallel.agreement import checked_on_all_ranks, from_rank_0
from megalard.parallel.mesh import Mesh, is_first_on_node
from megalard.training.run_folder import FINISHED, checkpoints

# Settings that a resumed run may change. Models and text are compared by their content, so that
# they may have moved; a RoPE table is compared by the frequencies that it gives.
_MAY_CHANGE = (
    "parallel.",
    "checkpoint.",
    "evaluation.",
    "run.output",
    "run.device",
    "run.deterministic",
    "run.log_every",
    "run.trackers",
    "run.report",
    "run.profile",
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

_NOTE = "run.json"
_HOLDER = "running.json"


@dataclass(frozen=True)
class Output:
    """The output directory as a run finds it.

    Attributes:
        directory: run.output.
        is_new: whether the directory was empty. It is emptied again if bad input ends the run.
        checkpoint: the newest complete checkpoint, from which the run resumes; None if there is
            none.
        is_finished: whether a run with these settings has finished, so that nothing is left to do.
    """

    directory: Path
    is_new: bool = True
    checkpoint: Path | None = None
    is_finished: bool = False

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.directory / "checkpoints"


def find_output(config: Config, mesh: Mesh) -> Output:
    """Return what run.output contains. This is a collective call, in which rank 0 reads the disk.

    Raises:
        UserError: on every rank, if the directory contains anything but this run, or its newest
            checkpoint is damaged.
    """
    output = None
    with checked_on_all_ranks(mesh.world):
        if mesh.is_rank_0:
            output = _look(config, Path(config.run.output))
    return from_rank_0(output, mesh.world)


@contextmanager
def open_output(config: Config, mesh: Mesh) -> Iterator[Output]:
    """Make the output directory, or find the run in it; a collective call.

    Until the block ends, no other process can run there.

    Raises:
        UserError: on every rank, as ``find_output``, or if the directory cannot be written or
            another process runs there.
    """
    output = find_output(config, mesh)
    with ExitStack() as stack:
        with checked_on_all_ranks(mesh.world):
            if mesh.is_rank_0:
                stack.enter_context(_lock(output, config))
        # Another process may have saved between the first look and the lock.
        yield output if output.is_new else find_output(config, mesh)


def check_is_there(output: Output, mesh: Mesh) -> None:
    """Refuse to write to an output directory that was removed meanwhile; a collective call.

    Raises:
        UserError: on every rank.
    """
    with checked_on_all_ranks(mesh.world):
        if mesh.is_rank_0 and not (output.directory / _NOTE).is_file():
            raise UserError(
                f"run.output {output.directory} was removed or moved while the run wrote to it: "
                "put it back, and start the same command again"
            )


@contextmanager
def emptied_on_error(output: Output, mesh: Mesh) -> Iterator[None]:
    """Empty the output directory of a new run if the block raises a ``UserError``.

    The block must not have written results. A corrected run can then use the same directory.
    """
    try:
        yield
    except UserError:
        if mesh.is_rank_0 and output.is_new:
            for entry in output.directory.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        raise


@contextmanager
def scratch_folder(mesh: Mesh) -> Iterator[Path]:
    """Choose a temporary directory, with the same name on every node; a collective call.

    The block may make the directory. It is removed at the end of the block.
    """
    name = from_rank_0(f"megalard-{token_hex(8)}", mesh.world)
    folder = Path(tempfile.gettempdir()) / name
    try:
        yield folder
        if mesh.world.size > 1:
            dist.barrier(group=mesh.world.group)
    finally:
        if is_first_on_node():
            shutil.rmtree(folder, ignore_errors=True)


def _lock(output: Output, config: Config) -> IO[bytes]:
    note = output.directory / _NOTE
    try:
        output.directory.mkdir(parents=True, exist_ok=True)
        holder = _describe_holder(output.directory)
        file = hold_lock(note, f"to run.output {output.directory}{holder}")
        _note_holder(output.directory)
        if note.stat().st_size == 0:
            note.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        elif output.is_new:
            file.close()
            raise UserError(
                f"another process has begun a run in run.output {output.directory}: start this "
                "command again to resume it, or choose another directory"
            )
    except OSError as error:
        raise UserError(
            f"cannot write to run.output {output.directory}: {error.strerror}"
        ) from None
    return file


def _note_holder(directory: Path) -> None:
    """Note which process runs here, for the error of a second start."""
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().isoformat(" ", "seconds"),
    }
    replace_text(directory / _HOLDER, json.dumps(holder) + "\n")


def _describe_holder(directory: Path) -> str:
    """Return in words which process ran here last; empty if that is not known."""
    try:
        holder = read_json(directory / _HOLDER)
        place = f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return ""
    return f" ({place})"


def _look(config: Config, directory: Path) -> Output:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return Output(directory)
    if not directory.is_dir():
        raise UserError(f"run.output {directory} is a file: choose a directory")
    output = Output(directory, is_new=False)
    saved = checkpoints(output.checkpoints)
    if saved:
        path = saved[-1][1]
        with naming_older_checkpoint(path):
            manifest = read_manifest(path)
        if manifest.kind != "training":
            raise UserError(
                f"{path} is a whole model and not a checkpoint of a run: move it out of "
                f"{output.checkpoints}"
            )
        check_run(manifest)
        with naming_bad_entries(manifest):
            _compare(manifest.training["config"], to_dict(config), directory)
        return Output(directory, False, path, _is_finished(directory, config))
    # A run that was stopped before its first checkpoint begins again.
    note = directory / _NOTE
    not_empty = UserError(f"run.output {directory} is not empty: choose another directory")
    if not note.is_file():
        raise not_empty
    try:
        if note.stat().st_size:  # a run that is killed at once leaves the file empty
            _compare(read_json(note), to_dict(config), directory)
    except (OSError, ValueError, AttributeError):
        raise not_empty from None
    return replace(output, is_finished=_is_finished(directory, config))


def mark_finished(output: Output, config: Config) -> None:
    """Note in the output directory that this run has finished."""
    replace_text(output.directory / FINISHED, json.dumps(to_dict(config), indent=2) + "\n")


def _is_finished(directory: Path, config: Config) -> bool:
    """Whether a run with these very settings has finished, and its student is there.

    The directory itself may have moved.
    """
    current = json.loads(json.dumps(to_dict(config)))
    try:
        finished = _with_defaults(read_json(directory / FINISHED))
        current["run"]["output"] = finished["run"]["output"] = None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False
    has_student = (directory / "student" / "config.json").is_file()
    return has_student and finished == current


@contextmanager
def naming_older_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Name the next older checkpoint in an error of the block about a damaged checkpoint."""
    try:
        yield
    except UserError as error:
        saved = [path for _, path in checkpoints(checkpoint.parent)]
        older = list(takewhile(lambda path: path != checkpoint, saved))
        hint = f"; remove {checkpoint} to resume from {older[-1].name}" if older else ""
        raise type(error)(f"{error}{hint}") from None


def _compare(saved: dict, current: dict, directory: Path) -> None:
    """Refuse a configuration with which a saved run cannot be resumed.

    Raises:
        UserError: a setting differs that must not; the message names the first one.
    """
    for group in ("streams", "stages"):
        names, now = (list((tree.get(group) or {}).keys()) for tree in (saved, current))
        if names != now:
            raise UserError(
                f"run.output {directory} holds a run with other {group} "
                f"({', '.join(names) or 'none'}, not {', '.join(now) or 'none'}): choose another "
                "directory, or set them back to resume that run"
            )
    for key, section in current.items():
        if isinstance(section, dict) and not isinstance(saved.get(key, {}), dict):
            raise ValueError(f"the section {key} of its configuration is {shown(saved[key])}")
    saved, current = _flat(_with_defaults(saved)), _flat(current)
    for key in sorted(saved.keys() & current.keys()):
        # The keys of stages and streams follow the rules of the sections that they replace.
        general = re.sub(r"^stages\.[^.]+\.", "", key)
        general = re.sub(r"^streams\.[^.]+\.(?=data\.|micro_)", "", general)
        if saved[key] != current[key] and not general.startswith(_MAY_CHANGE):
            raise UserError(
                f"run.output {directory} holds a run with {key} {shown(saved[key])}, not "
                f"{shown(current[key])}: choose another directory, or set it back to resume that "
                "run"
            )


def _with_defaults(saved: dict) -> dict:
    """Return the settings of a run, with defaults for those that are newer than the run."""
    try:
        return json.loads(json.dumps(to_dict(recorded_config(saved))))
    except UserError:
        # A later version has recorded settings that this one does not know.
        return in_present_spelling(saved)


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        is_section = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat
