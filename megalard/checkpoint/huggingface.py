"""Hugging Face model directories: every rank reads only its own slices, and ranks share writing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megalard.checkpoint.companions import Companion, is_companion
from megalard.checkpoint.sharded.manifest import ID_KEY, MANIFEST
from megalard.checkpoint.weights import Weights, no_tensor, tensor_bytes
from megalard.checkpoint.write_options import WriteOptions, split_by_size
from megalard.errors import UserError, shown
from megalard.files.atomic_folder import AtomicFolder
from megalard.files.reading import cannot_read, read_json
from megalard.files.safetensors import (
    DTYPES,
    DamagedFile,
    Entry,
    TensorFile,
    TensorSlice,
    in_file_order,
    read_ahead,
    write_tensor_file,
)
from megalard.files.writing import cannot_write, sync_files
from megalard.model.parameter_slice import ParameterSlice
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.mesh import SINGLE, Axis


class HuggingFaceWeights:
    """The tensors of a directory of safetensors files, under the names of the files.

    The files are those that transformers reads: the file that ``config.json`` names,
    ``model.safetensors``, or the files of the index. Without any of them they are all safetensors
    files of the directory.

    Args:
        model_dir: the directory.
        named: the file that ``config.json`` names as ``transformers_weights``.

    Raises:
        UserError: there are no safetensors files, a file that the index names is missing, a file
            cannot be read or is damaged, or a tensor is in two files.
    """

    def __init__(self, model_dir: str | Path, named: str | None = None):
        self.directory = Path(model_dir)
        self._files = {path: _open(path) for path in self._paths(named)}
        self._file_of: dict[str, Path] = {}
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118 (a TensorFile is not a mapping)
                if name in self._file_of:
                    raise UserError(
                        f"tensor {name} is in both {self._file_of[name].name} and {path.name} of "
                        f"{self.directory}: remove the file that does not belong there"
                    )
                self._file_of[name] = path

    def _paths(self, named: str | None) -> list[Path]:
        if named is not None:
            return self._named(named)
        single, index = (self.directory / f"model.safetensors{end}" for end in ("", ".index.json"))
        try:
            if single.is_file():
                return [single]
            if index.exists():
                return self._indexed(index)
            files = sorted(self.directory.iterdir()) if self.directory.is_dir() else []
        except OSError as error:
            raise cannot_read(error.filename or self.directory, error) from None
        # Files whose names begin with a dot belong to the file system and not to the model.
        paths = [
            path
            for path in files
            if path.suffix == ".safetensors" and not path.name.startswith(".")
        ]
        if not paths:
            is_pickled = any(path.suffix == ".bin" for path in files)
            fix = "convert its .bin files to safetensors" if is_pickled else "check the path"
            raise UserError(f"{self.directory} has no .safetensors files: {fix}")
        return paths

    def _named(self, named: str) -> list[Path]:
        """Return the files of ``transformers_weights`` in config.json."""
        if not isinstance(named, str) or Path(named).name != named:
            raise UserError(
                f"{self.directory}/config.json has {shown(named)} as transformers_weights, which "
                "must be the name of a file in the directory: correct it, or remove the key"
            )
        path = self.directory / named
        if not path.is_file():
            raise UserError(
                f"{self.directory}/config.json names {named} as transformers_weights, which is not "
                "there: download it again, or remove the key"
            )
        return self._indexed(path) if named.endswith(".index.json") else [path]

    def _indexed(self, index: Path) -> list[Path]:
        try:
            names = set(read_json(index)["weight_map"].values())
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is not a safetensors index: download it again") from None
        for name in sorted(names):
            if Path(name).name != name:
                raise UserError(
                    f"{index} names the file {name!r} outside its directory: download it again"
                )
        missing = [name for name in sorted(names) if not (self.directory / name).is_file()]
        if missing:
            raise UserError(
                f"{self.directory} lacks {', '.join(missing)}, which its index names: download it "
                "again"
            )
        return [self.directory / name for name in sorted(names)]

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._slice(name).get_dtype()]

    def files(self) -> list[Path]:
        return list(self._files)

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the tensor, or a slice of it, in the dtype of the file."""
        tensor = self._slice(name)
        index: tuple[slice, ...] = (slice(None),)
        if held is not None and held.dim is not None:
            local = slice(held.start, held.start + held.length)
            index = (local,) if held.dim == 0 else (slice(None), local)
        try:
            return tensor[index]
        except OSError as error:
            raise cannot_read(self._file_of[name], error) from None
        except DamagedFile as error:
            raise _damaged(self._file_of[name], error) from None

    def _slice(self, name: str) -> TensorSlice:
        if name not in self._file_of:
            raise no_tensor(name, self)
        return self._files[self._file_of[name]].get_slice(name)


def _open(path: Path) -> TensorFile:
    try:
        file = TensorFile(path)
    except OSError as error:
        raise cannot_read(path, error) from None
    except DamagedFile as error:
        raise _damaged(path, error) from None
    if ID_KEY in file.metadata:
        raise UserError(
            f"{path} is part of a sharded checkpoint, but {path.parent} has no {MANIFEST}: restore "
            "it, or use another checkpoint"
        )
    return file


def _damaged(path: Path, error: DamagedFile) -> UserError:
    return UserError(f"{path} is truncated or damaged ({error}): download it again")


def plan_files(weights: Weights, file_bytes: int) -> list[dict[str, Entry]]:
    """Return the tensors of each file, in the order in which they are written."""
    entries = {name: Entry(weights.dtype(name), weights.shape(name)) for name in weights.names()}
    sizes = {name: tensor_bytes(weights, name) for name in entries}
    return [
        {name: entries[name] for name in in_file_order({n: entries[n] for n in names})}
        for names in split_by_size(sizes, file_bytes)
    ]


def bytes_of_rank(weights: Weights, file_bytes: int, axis: Axis) -> int:
    """Return the number of bytes that ``write_huggingface`` has this rank write."""
    files = plan_files(weights, file_bytes)[axis.rank :: axis.size]
    return sum(entry.nbytes for entries in files for entry in entries.values())


def write_huggingface(
    directory: str | Path,
    weights: Weights,
    config: dict,
    options: WriteOptions,
    *,
    axis: Axis = SINGLE,
    ahead: bool = False,
    replace: bool = False,
) -> None:
    """Write a Hugging Face model directory that appears complete or not at all.

    The ranks of the axis share the files.

    Args:
        directory: the target.
        weights: read one tensor at a time, in the order of ``plan_files``.
        config: the content of ``config.json``.
        ahead: whether a thread reads the next tensor while one is written. It must be false if
            reading a weight is a collective call.
        replace: whether an earlier directory of this name is replaced. Without it the target must
            not exist or be empty.

    Raises:
        UserError: on every rank, if any rank cannot write. What was there before is unchanged.
    """
    directory = Path(directory)
    folder = AtomicFolder(directory, replace, _is_written_by_us)
    files = plan_files(weights, options.file_bytes)
    count = len(files)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    try:
        with _disk_errors_on_all_ranks(directory, axis):
            if axis.rank == 0:
                folder.begin()
        with _disk_errors_on_all_ranks(directory, axis):
            for name, entries in list(zip(names, files, strict=True))[axis.rank :: axis.size]:
                tensors = map(weights.read, entries)
                write_tensor_file(
                    folder.path / name,
                    entries,
                    read_ahead(tensors) if ahead else tensors,
                    {"format": "pt"},
                    options.progress,
                    checksum=False,
                )
        options.before_commit()
        with _disk_errors_on_all_ranks(directory, axis):
            if axis.rank == 0:
                _write_small_files(folder.path, names, files, config, options.companions)
                options.check(folder.path)
                folder.commit()
    except BaseException:  # Ctrl-C included: an interrupted export leaves nothing behind
        if axis.rank == 0:
            folder.abandon()
        raise


def _is_written_by_us(name: str) -> bool:
    """Whether an entry of an exported directory is one that ``write_huggingface`` writes."""
    is_weights = name.startswith("model") and ".safetensors" in name
    return is_weights or name == "config.json" or is_companion(name)


@contextmanager
def _disk_errors_on_all_ranks(directory: Path, axis: Axis) -> Iterator[None]:
    """Raise an ``OSError`` of the block on any rank as a ``UserError`` on all of them."""
    with checked_on_all_ranks(axis):
        try:
            yield
        except OSError as error:
            raise cannot_write(directory, error) from None


def _write_small_files(
    folder: Path,
    names: list[str],
    files: list[dict[str, Entry]],
    config: dict,
    companions: tuple[Companion, ...],
) -> None:
    """Write the index, config.json and the companion files."""
    if len(files) > 1:
        total = sum(entry.nbytes for entries in files for entry in entries.values())
        file_of = {t: name for name, entries in zip(names, files, strict=True) for t in entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for companion in companions:
        companion.write(folder)
    sync_files(folder)
