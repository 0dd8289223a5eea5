"""Starting ranks: the one helper every distributed test uses.

They are forked from a server that has imported what they need, which takes each of them some eight
seconds otherwise.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable

import torch
import torch.multiprocessing as multiprocessing

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["pytest", "megalard.train", "tests.models", "torch.utils.tensorboard"]
)


def run_ranks(world: int, function: Callable, *args) -> None:
    """Call ``function(*args)`` in ``world`` processes set up as torchrun does.

    An exception of any rank fails the caller, naming the rank; nothing is left running.
    """
    # CUDA in forked ranks has not been tried
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    arguments = (world, free_port(), function, args)
    multiprocessing.start_processes(_rank, arguments, nprocs=world, start_method=method)


def start_ranks(world: int, function: Callable, *args) -> list:
    """The same ranks, started only: they may be killed, and end with ``wait_for``."""
    arguments = (world, free_port(), function, args)
    ranks = [
        _SERVER.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def wait_for(ranks: list, limit_s: float = 120) -> list[int]:
    """The ranks' exit codes; what runs longer than the limit is killed."""
    for rank in ranks:
        rank.join(limit_s)
        if rank.is_alive():
            rank.kill()
            rank.join()
    return [rank.exitcode for rank in ranks]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank: int, world: int, port: int, function: Callable, args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        function(*args)
    except BaseException:
        print(f"rank {rank} of {world} failed:\n{traceback.format_exc()}", flush=True)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
