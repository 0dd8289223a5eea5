"""Starting ranks that may be killed: forked from one server that has imported everything."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable

import torch.multiprocessing as multiprocessing

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["megalard.train", "tests.checkpoint.processes"])


def start_ranks(world: int, function: Callable, *args) -> list:
    """Start ``function(*args)`` in ``world`` processes set up as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        _SERVER.Process(target=_rank, args=(rank, world, port, function, args), daemon=True)
        for rank in range(world)
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


def run_forked(world: int, function: Callable, *args) -> None:
    """Run to the end; an exception of any rank fails the caller."""
    codes = wait_for(start_ranks(world, function, *args))
    assert codes == [0] * world, f"exit codes {codes}"


def _rank(rank: int, world: int, port: int, function: Callable, args: tuple) -> None:
    import torch

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
    except Exception:
        print(f"rank {rank} of {world} failed:\n{traceback.format_exc()}", flush=True)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
