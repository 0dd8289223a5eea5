"""End a rank that waits for another rank which has ended, and say so.

A collective whose partner is gone may wait until its timeout, which is two hours. A launcher ends
the other ranks if one rank fails, but not if one ends with status 0.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time

import torch.distributed as dist

from megalard.error_file import leave_reason

# After the end of a rank the others get this time to end by themselves, with their own messages.
PATIENCE_S = 30.0
_TICK_S = 1.0


def watch_other_ranks(patience_s: float = PATIENCE_S) -> None:
    """Watch the other ranks on this machine until torch.distributed ends; a collective call.

    If one of them has ended and this process still takes part in torch.distributed ``patience_s``
    seconds later, this process prints a sentence and ends with status 1. Without pidfds, which
    Linux has since version 5.3, nothing is watched.
    """
    rank = dist.get_rank()
    places: list = [None] * dist.get_world_size()
    dist.all_gather_object(places, (_machine(), os.getpid()))
    others = {}
    for number, (machine, pid) in enumerate(places):
        if number != rank and machine == _machine():
            try:
                others[os.pidfd_open(pid)] = (number, pid)
            except (AttributeError, OSError):
                continue
    if others:
        arguments = (rank, others, patience_s)
        threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True).start()


def _machine() -> tuple[str, str]:
    """Return a value that is equal for two processes exactly if they see each other's ids."""
    try:
        return socket.gethostname(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname(), ""


def _watch(rank: int, others: dict[int, tuple[int, int]], patience_s: float) -> None:
    try:
        ended: list[int] = []
        while not ended:
            ended, _, _ = select.select(list(others), [], [], _TICK_S)
            if not dist.is_initialized():
                return
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            time.sleep(_TICK_S / 4)
            if not dist.is_initialized():
                return
    finally:
        for descriptor in others:
            os.close(descriptor)
    number, pid = others[ended[0]]
    sentence = (
        f"rank {rank} ends: rank {number} (process {pid}) ended {patience_s:.0f} s ago, and what "
        "this rank waits for will not come: run the same command to resume from the last checkpoint"
    )
    if not leave_reason(sentence, is_bad_input=False):
        print(f"megalard: error: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)
