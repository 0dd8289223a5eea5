"""Sharded checkpoints: saved by all ranks together, and read by any number of ranks.

A parameter is a local tensor and a ``Layout``. Here it becomes a DTensor, so that
``torch.distributed.checkpoint`` decides who writes which slice, and what a rank on another layout
must read. ``ShardedWeights`` reads slices without any other rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megalard.checkpoint.provenance import check_checksums
from megalard.checkpoint.sharded.dcp_storage import STATE_PREFIXES, Box, ShardReader, ShardWriter
from megalard.checkpoint.sharded.manifest import ID_KEY, MANIFEST, Manifest, read_manifest
from megalard.checkpoint.write_options import WriteOptions
from megalard.errors import UserError
from megalard.files.reading import cannot_read
from megalard.files.safetensors import DTYPES, DamagedFile, TensorFile
from megalard.files.writing import Progress, no_progress
from megalard.model.layout import Layout
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.mesh import SINGLE, Axis, Mesh

warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def checkpoint_axis(mesh: Mesh) -> Axis:
    """Return all ranks in a new gloo group; a collective call.

    A save in the background communicates in it while the trainer communicates in the groups of the
    mesh.
    """
    if mesh.world.size == 1:
        return SINGLE
    return Axis(dist.new_group(backend="gloo"), mesh.world.rank, mesh.world.size)


def as_dtensor(local: torch.Tensor, layout: Layout, mesh: Mesh) -> torch.Tensor:
    """Return the full parameter as a DTensor over all ranks; a plain tensor in a single process.

    The DTensor is replicated over the data-parallel ranks, and over neighboring ranks that hold the
    same K/V heads.
    """
    assert tuple(local.shape) == layout.local_shape
    if mesh.world.size == 1:
        return local
    placements: list[Placement] = [Replicate(), Replicate(), Replicate()]
    replicas = mesh.tp.size
    if layout.dim is not None:
        placements[1], replicas = Shard(layout.dim), layout.replicas
    device_type = mesh.device.type if local.is_meta else local.device.type
    stride, strides = 1, []
    for size in reversed(layout.full_shape):
        strides.insert(0, stride)
        stride *= max(1, size)
    return DTensor.from_local(
        local,
        _device_mesh(device_type, mesh.world.size, mesh.tp.size, replicas),
        placements,
        run_check=False,
        shape=torch.Size(layout.full_shape),
        stride=tuple(strides),
    )


@cache
def _device_mesh(device_type: str, world: int, tp: int, replicas: int) -> DeviceMesh:
    """Return the ranks as (data-parallel, parts, replicas); tp ranks are neighbors.

    The mesh only names ranks, so it needs no process groups.
    """
    ranks = torch.arange(world).view(world // tp, tp // replicas, replicas)
    return DeviceMesh(device_type, ranks, _init_backend=False)


def save_sharded(
    directory: str | Path,
    tensors: Mapping[str, torch.Tensor],
    sections: dict,
    axis: Axis,
    options: WriteOptions,
    planner: dcp.SavePlanner | None = None,
) -> None:
    """Write a checkpoint that appears completely or not at all; a collective call of all ranks.

    Args:
        directory: its final name, which must not exist.
        tensors: DTensors, tensors that are equal on all ranks that have them, or, with a
            ``LazySavePlanner``, tensors without storage.
        sections: all sections of the manifest except tensors and files, equal on every rank.
        axis: all ranks, with a process group for CPU tensors.

    Raises:
        UserError: on every rank, if any rank cannot write. What was there before is unchanged.
    """
    directory = Path(directory)
    writer = ShardWriter(directory, sections, options)
    # A rank of an uneven vocabulary may hold no rows. A full tensor without elements is kept.
    tensors = {
        name: value for name, value in tensors.items() if _local(value).numel() or not value.numel()
    }
    try:
        dcp.save(
            tensors,
            storage_writer=writer,
            planner=planner or dcp.DefaultSavePlanner(flatten_state_dict=False),
            process_group=axis.group,
            no_dist=axis.size == 1,
        )
        options.before_commit()
        with checked_on_all_ranks(axis):
            if axis.rank == 0:
                _commit(writer)
    except BaseException as error:  # an interrupted save leaves nothing either
        if axis.rank == 0:
            writer.folder.abandon()
        if isinstance(error, (CheckpointException, OSError)):
            raise _cannot_save(directory, error) from None
        raise


def _commit(writer: ShardWriter) -> None:
    try:
        writer.folder.commit()
    except OSError as error:
        raise _cannot_save(writer.folder.directory, error) from None


def _cannot_save(directory: Path, error: BaseException) -> UserError:
    return UserError(
        f"cannot write checkpoint {directory}: {_reason(error)}; what was saved before is untouched"
    )


def load_sharded(weights: ShardedWeights, tensors: dict[str, torch.Tensor], axis: Axis) -> None:
    """Fill tensors from a checkpoint; a collective call.

    Args:
        tensors: DTensors, or tensors that are equal on all ranks.

    Raises:
        UserError: on every rank, if a tensor is missing, has another shape or cannot be read.
    """
    with checked_on_all_ranks(axis):
        for name, value in tensors.items():
            weights.check(name, tuple(value.shape))
    try:
        dcp.load(
            {name: value for name, value in tensors.items() if _local(value).numel()},
            storage_reader=ShardReader(weights.manifest, weights.read_chunk),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
            process_group=axis.group,
            no_dist=axis.size == 1,
        )
    except (CheckpointException, OSError) as error:
        raise UserError(f"cannot read checkpoint {weights.directory}: {_reason(error)}") from None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _reason(error: BaseException) -> str:
    """Return in words what failed on the first failing rank. A programming error is raised."""
    if isinstance(error, CheckpointException):
        error = min(error.failures.items())[1][0]
    if isinstance(error, OSError):
        path = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{path}"
    if isinstance(error, (UserError, DamagedFile)):
        return str(error)
    raise error


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
        """Return every file of the checkpoint, with the manifest."""
        return [self.directory / name for name in (*self.manifest.files, MANIFEST)]

    def read(self, name: str, layout: Layout | None = None) -> torch.Tensor:
        """Return the tensor, or the slice of a layout, in its dtype, on the CPU."""
        shape = self.shape(name)
        start, size = [0] * len(shape), list(shape)
        if layout is not None and layout.dim is not None:
            start[layout.dim], size[layout.dim] = layout.start, layout.length
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
            UserError: naming the tensor.
        """
        if self.shape(name) != shape:
            raise UserError(
                f"tensor {name} in {self.directory} has shape {list(self.shape(name))}, but the "
                f"model needs {list(shape)}: it is a checkpoint of another model"
            )

    def check_sums(self, share: Axis = SINGLE, progress: Progress = no_progress) -> None:
        """Read this rank's share of the files and compare their checksums.

        Raises:
            UserError: naming the first file that differs.
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
