"""Starting ranks: the one helper every distributed test uses."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable

import torch
import torch.multiprocessing as multiprocessing


def run_ranks(world: int, function: Callable, *args) -> None:
    """Call ``function(*args)`` in ``world`` processes set up as torchrun does.

    An exception of any rank fails the caller, naming the rank; nothing is left running.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_rank, (world, port, function, args), nprocs=world)


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
