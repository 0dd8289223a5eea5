"""Sharded checkpoints: saved by all ranks together, and read by any number of ranks.

A parameter is a local tensor and a ``ParameterSlice``. Here it becomes a DTensor, so that
``torch.distributed.checkpoint`` decides which rank writes which slice, and what a rank on another
layout of ranks must read. ``checkpoint.sharded.read`` reads slices without any other rank.
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

from megalard.checkpoint.sharded.dcp_storage import ShardReader, ShardWriter
from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.checkpoint.write_options import WriteOptions
from megalard.errors import UserError
from megalard.files.safetensors import DamagedFile
from megalard.model.parameter_slice import ParameterSlice
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.mesh import SINGLE, Axis, Mesh

warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def checkpoint_axis(mesh: Mesh) -> Axis:
    """Return all ranks in a new gloo group; a collective call.

    A save in the background communicates in this group while the trainer communicates in the groups
    of the mesh.
    """
    if mesh.world.size == 1:
        return SINGLE
    return Axis(dist.new_group(backend="gloo"), mesh.world.rank, mesh.world.size)


def as_dtensor(
    local: torch.Tensor, held: ParameterSlice, mesh: Mesh, is_sharded: bool = False
) -> torch.Tensor:
    """Return the full parameter as a DTensor over all ranks; a plain tensor in a single process.

    Args:
        local: this rank's slice of the parameter, or its part of the slice.
        held: which slice this is.
        is_sharded: whether the ranks that hold the slice have divided it along dim 0, as
            torch.chunk does. Otherwise the DTensor is replicated over these ranks.
    """
    assert is_sharded or tuple(local.shape) == held.local_shape
    if mesh.world.size == 1:
        return local
    placements: list[Placement] = [Replicate(), Shard(0) if is_sharded else Replicate()]
    replicas = mesh.tp.size
    if held.dim is not None:
        placements[0], replicas = Shard(held.dim), held.replicas
    device_type = mesh.device.type if local.is_meta else local.device.type
    stride, strides = 1, []
    for size in reversed(held.full_shape):
        strides.insert(0, stride)
        stride *= max(1, size)
    return DTensor.from_local(
        local,
        _device_mesh(device_type, mesh.world.size, mesh.tp.size, replicas),
        placements,
        run_check=False,
        shape=torch.Size(held.full_shape),
        stride=tuple(strides),
    )


@cache
def _device_mesh(device_type: str, world: int, tp: int, replicas: int) -> DeviceMesh:
    """Return the ranks as (slices, ranks that hold the slice); tp ranks are neighbors.

    The mesh only names ranks, so it needs no process groups.
    """
    ranks = torch.arange(world).view(world // tp, tp // replicas, replicas)
    ranks = ranks.transpose(0, 1).flatten(1)
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
        directory: the final name of the checkpoint, which must not exist.
        tensors: DTensors, tensors that are equal on all ranks that have them, or, with a
            ``LazySavePlanner``, tensors without storage.
        sections: all sections of the manifest except tensors and files, equal on every rank.
        axis: all ranks, with a process group for CPU tensors.
        options: companion files, size of the shards, and progress.
        planner: None fetches the tensors from memory; a ``LazySavePlanner`` reads them.

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
    except BaseException as error:  # Ctrl-C included: an interrupted save leaves nothing behind
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
