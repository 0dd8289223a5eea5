"""The mesh of ranks: named axes dp, cp and tp, passed explicitly to whatever communicates."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megalard.errors import UserError
from megalard.parallel.watchdog import watch_other_ranks
from megalard.parents import end_with_parent


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as one rank sees it.

    Attributes:
        group: the process group; None when the size is 1, and collectives then do nothing.
        rank: the place of this rank along the axis.
        size: the number of ranks along the axis.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int


SINGLE = Axis(None, 0, 1)


@dataclass(frozen=True)
class Mesh:
    """All axes of a run.

    Attributes:
        world: every rank.
        dp: ranks that hold the same weights and read different blocks.
        cp: ranks that hold the same weights and share the tokens of each block.
        data: dp and cp together: the ranks over which gradients of the same weights are summed.
        tp: ranks that share one copy of the weights. They are neighbors in rank, so that on a
            cluster they are on one node.
        device: the device of this rank.
    """

    world: Axis
    dp: Axis
    cp: Axis
    data: Axis
    tp: Axis
    device: torch.device

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.world.rank == 0

    def holders(self, replicas: int) -> Axis:
        """Return the axis of all ranks that hold the same slice of a parameter.

        This is a collective call: every rank makes it, with the same argument.

        Args:
            replicas: the number of neighboring tp ranks that hold the slice.
        """
        if replicas == 1:
            return self.data
        if replicas == self.tp.size:
            return self.world
        rows = torch.arange(self.world.size).view(-1, self.tp.size // replicas, replicas)
        axis = SINGLE
        for ranks in rows.transpose(0, 1).flatten(1).tolist():
            group = dist.new_group(ranks)
            if self.world.rank in ranks:
                axis = Axis(group, ranks.index(self.world.rank), len(ranks))
        return axis


def build_mesh(device: str, tp: int, cp: int = 1) -> Mesh:
    """Start torch.distributed if torchrun launched this process, and lay out ranks as (dp, cp, tp).

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        tp: tensor-parallel size.
        cp: context-parallel size. The data-parallel size is ranks / (cp * tp).

    Raises:
        UserError: the number of ranks is not a multiple of cp * tp, there is no such device, or
            torchrun would hand restarted ranks a store with stale addresses.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world % (cp * tp):
        raise UserError(
            f"parallel.tp {tp} times parallel.cp {cp} is {cp * tp} but {world} processes were "
            f"started: start a multiple of {cp * tp} (launch/train.sh --gpus N), or choose sizes "
            f"whose product divides {world}"
        )
    target = pick_device(device, local_rank)
    if world == 1:
        return Mesh(SINGLE, SINGLE, SINGLE, SINGLE, SINGLE, target)
    end_with_parent()
    _check_restarts()
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if not dist.is_initialized():
        start_process_group("nccl" if target.type == "cuda" else "gloo")
        watch_other_ranks()
    names, shape = ("dp", "cp", "tp"), (world // (cp * tp), cp, tp)
    mesh = init_device_mesh(target.type, shape, mesh_dim_names=names)
    axes = {name: _axis(mesh.get_group(name)) for name in names}
    data = axes["dp"] if cp == 1 else _axis(mesh["dp", "cp"]._flatten("data").get_group())
    return Mesh(world=_axis(dist.group.WORLD), data=data, device=target, **axes)


def start_process_group(backend: str) -> None:
    """Start torch.distributed for the ranks that torchrun launched.

    Ranks of one node find each other through a file in the private directory that torchrun gives
    them, and communicate over the loopback interface, so that nothing listens on the network.
    """
    # Rank 0 may tokenize a large corpus while the other ranks wait.
    timeout = timedelta(hours=2)
    world, local = (os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if world != local or not error_file:
        dist.init_process_group(backend, timeout=timeout)
        return
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    # torchrun makes the directory for this start alone: ATTEMPT/LOCAL_RANK/error.json.
    path = Path(error_file).parents[1] / "store"
    store = dist.FileStore(str(path), int(world))
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=int(world), timeout=timeout)


def allowed_restarts() -> int:
    """Return how many times torchrun may start all ranks again."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def is_first_on_node() -> bool:
    """Whether this is the one process of its node that does what is done once per node."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _check_restarts() -> None:
    """Refuse restarts in torchrun's shared store, which keeps the addresses of ended ranks.

    Observed with torch 2.13.
    """
    restarts = allowed_restarts()
    is_one_node = os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE")
    if restarts and not is_one_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            f"torchrun was given --max-restarts {restarts}, and restarted ranks would look for "
            "each other at the addresses of the ranks before them: start with launch/train.sh "
            "--max-restarts, or set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
        )


def pick_device(device: str, local_rank: int) -> torch.device:
    """Return the device of this rank: the GPU of its local rank, or the CPU.

    Raises:
        UserError: torch sees no GPU, or fewer GPUs than there are processes on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device is cuda but torch sees no GPU: use run.device cpu")
    # Every rank compares the counts, because rank 0, which reports errors, always has a GPU.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes were started on a machine with {torch.cuda.device_count()} "
            "GPUs: start one process per GPU"
        )
    return torch.device("cuda", local_rank)


def _axis(group: dist.ProcessGroup) -> Axis:
    size = dist.get_world_size(group)
    return SINGLE if size == 1 else Axis(group, dist.get_rank(group), size)
