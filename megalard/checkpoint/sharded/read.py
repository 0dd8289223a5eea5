"""Read a sharded checkpoint slice by slice, without any other rank and without torch's checkpoints.

``torch.distributed.checkpoint`` takes seconds to import, which a command that only reads need not
wait for.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megalard.checkpoint.provenance import check_checksums
from megalard.checkpoint.sharded.manifest import (
    ID_KEY,
    MANIFEST,
    STATE_PREFIXES,
    Box,
    Manifest,
    read_manifest,
)
from megalard.errors import UserError
from megalard.files.reading import cannot_read
from megalard.files.safetensors import DTYPES, DamagedFile, TensorFile
from megalard.files.writing import Progress, no_progress
from megalard.model.parameter_slice import ParameterSlice
from megalard.parallel.mesh import SINGLE, Axis


class ShardedWeights:
    """The tensors of a sharded checkpoint, which are read by slice.

    Attributes:
        directory: the directory of the checkpoint.
        manifest: its manifest.

    Raises:
        UserError: as ``read_manifest``.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest: Manifest = read_manifest(directory)
        self._open_files: dict[str, TensorFile] = {}

    def names(self) -> list[str]:
        """Return the names of the weights, without the tensors of the optimizer."""
        if self.manifest.kind == "model":  # it has no optimizer, whatever its tensors are called
            return list(self.manifest.tensors)
        return [name for name in self.manifest.tensors if not name.startswith(STATE_PREFIXES)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._tensor(name)["dtype"]]

    def files(self) -> list[Path]:
        """Return the paths of all files of the checkpoint, the manifest included."""
        return [self.directory / name for name in (*self.manifest.files, MANIFEST)]

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the tensor, or a slice of it, in its dtype, on the CPU."""
        shape = self.shape(name)
        start, size = [0] * len(shape), list(shape)
        if held is not None and held.dim is not None:
            start[held.dim], size[held.dim] = held.start, held.length
        return self.read_box(name, tuple(start), tuple(size))

    def read_box(self, name: str, start: Box, size: Box) -> torch.Tensor:
        """Return the box of ``size`` at ``start``, assembled from the saved slices it overlaps."""
        out = None  # read_manifest has checked that the slices cover the tensor
        for chunk in self._tensor(name)["chunks"]:
            offset, length = chunk["offsets"], chunk["shape"]
            low = [max(a, b) for a, b in zip(start, offset, strict=True)]
            high = [
                min(a + n, b + m) for a, n, b, m in zip(start, size, offset, length, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            part = self.read_chunk(
                chunk["file"],
                name,
                tuple(a - b for a, b in zip(low, offset, strict=True)),
                tuple(b - a for a, b in zip(low, high, strict=True)),
            )
            if tuple(part.shape) == tuple(size):
                return part
            if out is None:
                out = torch.empty(size, dtype=self.dtype(name))
            out[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))] = part
        return out if out is not None else torch.empty(size, dtype=self.dtype(name))

    def read_chunk(self, file: str, name: str, start: Box, size: Box) -> torch.Tensor:
        """Return a box of one saved slice, counted from the corner of that slice."""
        if file not in self._open_files:
            self._open_files[file] = self._open_file(file)
        try:
            return self._open_files[file].read(name, start, size)
        except OSError as error:
            raise cannot_read(self.directory / file, error) from None
        except DamagedFile as error:
            raise UserError(f"cannot read {self.directory / file}: {error}") from None

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that is missing or has another shape.

        Raises:
            UserError: the tensor is missing or has another shape; the message names it.
        """
        if self.shape(name) != shape:
            raise UserError(
                f"tensor {name} in {self.directory} has shape {list(self.shape(name))}, but the "
                f"model needs {list(shape)}: it is a checkpoint of another model"
            )

    def check_sums(self, share: Axis = SINGLE, progress: Progress = no_progress) -> None:
        """Read this rank's share of the files and compare their checksums.

        Raises:
            UserError: a file differs; the message names the first one.
        """
        files = list(self.manifest.files.items())[share.rank :: share.size]
        for name, _ in files:
            if name.endswith(".safetensors"):
                self._open_file(name)
        check_checksums(self.directory, files, progress=progress)

    def _open_file(self, name: str) -> TensorFile:
        path = self.directory / name
        try:
            file = TensorFile(path)
        except OSError as error:
            raise cannot_read(path, error) from None
        except DamagedFile as error:
            raise UserError(f"{path} is damaged ({error}): use another checkpoint") from None
        if file.metadata.get(ID_KEY) != self.manifest.body["id"]:
            raise UserError(
                f"{path} belongs to another checkpoint: restore the file that its manifest names"
            )
        for tensor, value in self.manifest.tensors.items():
            for chunk in value["chunks"]:
                if chunk["file"] == name:
                    entry = file.entries.get(tensor)
                    if entry is None or list(entry.shape) != chunk["shape"]:
                        raise UserError(
                            f"{path} lacks a slice of {tensor}: restore the file, or use another "
                            "checkpoint"
                        )
        return file

    def _tensor(self, name: str) -> dict:
        if name not in self.manifest.tensors:
            raise UserError(
                f"{self.directory} has no tensor {name}: it is a checkpoint of another model"
            )
        return self.manifest.tensors[name]
