"""Writing a Hugging Face directory, tensor by tensor, in files of a chosen size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megalard.checkpoint.sharded.dcp_storage import split_by_size
from megalard.checkpoint.weights import Weights
from megalard.files.atomic_folder import PartialFolder, cannot_write
from megalard.files.safetensors import (
    Entry,
    in_file_order,
    read_ahead,
    sync_files,
    write_tensor_file,
)
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.mesh import SINGLE, Axis

FILE_BYTES = 4 * 2**30


def plan_files(weights: Weights, file_bytes: int) -> list[dict[str, Entry]]:
    """The files' tensors, in the order they are written in."""
    entries = {name: Entry(weights.dtype(name), weights.shape(name)) for name in weights.names()}
    return [
        {name: entries[name] for name in in_file_order({n: entries[n] for n in names})}
        for names in split_by_size(entries, file_bytes)
    ]


def bytes_of_rank(weights: Weights, file_bytes: int, axis: Axis) -> int:
    """Of the files that ``write_huggingface`` has this rank write."""
    files = plan_files(weights, file_bytes)[axis.rank :: axis.size]
    return sum(entry.nbytes for entries in files for entry in entries.values())


def write_huggingface(
    directory: str | Path,
    weights: Weights,
    config: dict,
    companions: Iterable[Path],
    *,
    axis: Axis = SINGLE,
    file_bytes: int = FILE_BYTES,
    progress: Callable[[int], None] = lambda count: None,
    ahead: bool = False,
    replace: bool = False,
    before_commit: Callable[[], None] = lambda: None,
) -> None:
    """Write a model; the ranks of the axis share the files. It appears complete or not at all.

    Args:
        directory: where to.
        weights: read one tensor at a time, in the order of ``plan_files``.
        config: ``config.json``.
        companions: files copied beside the weights.
        file_bytes: a file ends before it would exceed this, unless one tensor alone does.
        ahead: read the next tensor in a thread while one is written; not for weights whose reading
            is a collective call.
        replace: whether an earlier save gives way; else the directory must not exist or be empty.
        before_commit: called when everything is written and nothing has its name yet.

    Raises:
        UserError: on every rank, when any cannot write; what was there before is as it was.
    """
    directory = Path(directory)
    partial = PartialFolder(directory, replace)
    files = plan_files(weights, file_bytes)
    count = len(files)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    try:
        with _told(directory, axis):
            if axis.rank == 0:
                partial.begin()
        with _told(directory, axis):
            for name, entries in list(zip(names, files, strict=True))[axis.rank :: axis.size]:
                tensors = map(weights.read, entries)
                write_tensor_file(
                    partial.path / name,
                    entries,
                    read_ahead(tensors) if ahead else tensors,
                    {"format": "pt"},
                    progress,
                    checksum=False,
                )
        before_commit()
        with _told(directory, axis):
            if axis.rank == 0:
                _write_rest(partial.path, names, files, config, companions)
                partial.commit()
    except BaseException:  # an interrupted export leaves nothing either
        if axis.rank == 0:
            partial.abandon()
        raise


@contextmanager
def _told(directory: Path, axis: Axis) -> Iterator[None]:
    """A block of every rank; an ``OSError`` in it is told to all as a ``UserError``."""
    with checked_on_all_ranks(axis):
        try:
            yield
        except OSError as error:
            raise cannot_write(directory, error) from None


def _write_rest(partial: Path, names, files, config: dict, companions: Iterable[Path]) -> None:
    if len(files) > 1:
        total = sum(entry.nbytes for entries in files for entry in entries.values())
        where = {t: name for name, entries in zip(names, files, strict=True) for t in entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in companions:
        if file.is_file():
            shutil.copyfile(file, partial / file.name)
    sync_files(partial)
