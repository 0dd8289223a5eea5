"""Start ranks: the one helper that every distributed test uses.

Ranks are forked from a server that has imported what they need. A process that imports the same
modules itself takes some eight seconds.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import torch
import torch.multiprocessing as multiprocessing

# The limit is for ranks that hang: on busy cores a job of a few seconds has taken a minute.
LIMIT_S = 300

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preloaded"])


def run_ranks(world: int, function: Callable, *args) -> None:
    """Call ``function(*args)`` in ``world`` processes that are set up as torchrun sets them up.

    An exception of any rank fails the caller and names the rank. Nothing is left running.
    """
    # CUDA has not been tried in forked ranks.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    arguments = (world, free_port(), function, args)
    context = multiprocessing.start_processes(
        _rank, arguments, nprocs=world, start_method=method, join=False, daemon=True
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, f"{world} ranks still run after {LIMIT_S} s"
    finally:
        kill(context.processes)


@contextmanager
def started_ranks(world: int, function: Callable, *args) -> Iterator[list[BaseProcess]]:
    """Start the same ranks without waiting for them; kill at the end those that still run."""
    arguments = (world, free_port(), function, args)
    ranks = [
        SERVER.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(world)
    ]
    try:
        for rank in ranks:
            rank.start()
        yield ranks
    finally:
        kill([rank for rank in ranks if rank.pid is not None])


def exit_codes(ranks: list[BaseProcess], limit_s: float = 120) -> list[int]:
    """Wait for ranks to end and return their exit codes; a rank that exceeds the limit is killed.

    Args:
        limit_s: the limit for all ranks together, in seconds.
    """
    deadline = time.monotonic() + limit_s
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    kill(ranks)
    return [rank.exitcode for rank in ranks]


def kill(processes: list[BaseProcess]) -> None:
    """Kill the processes that still run, and wait for their end."""
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def wait_until(condition: Callable[[], object], limit_s: float = 120) -> None:
    """Wait for a condition that another process makes true."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition does not hold after {limit_s} s"
        time.sleep(0.02)


def free_port() -> int:
    """Return a port of this machine that nothing uses."""
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
    except SystemExit:
        raise
    except BaseException:
        print(f"rank {rank} of {world} failed:\n{traceback.format_exc()}", flush=True)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
