"""Stopping when asked to: SIGTERM and SIGUSR1, which Slurm sends ahead of a time limit."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """What a run does with the signals, in a ``with`` statement around all of it.

    While it takes steps, a signal asks it to stop after the step; more of them change nothing,
    since one request may reach a rank both from its launcher and directly. Before and after, where
    there is nothing to save, a signal ends the run at once. Either way the status is 0.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._received = 0
        self._stepping = False
        self._before: dict = {}

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread listen
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def after_a_step(self) -> Iterator[None]:
        """In this block the signals wait for ``agreed``."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _handle(self, number: int, frame: object) -> None:
        if not self._stepping:
            if self.mesh.world.rank == 0:
                print(f"{signal.Signals(number).name}: stopped; nothing to save", flush=True)
            sys.exit(0)
        self._received = self._received or number

    def agreed(self, failed: bool) -> tuple[str | None, bool]:
        """The signal any rank was sent, and whether ``failed`` holds on any of them.

        A collective call after every step, so that all ranks stop after the same one.
        """
        flags = torch.tensor([float(self._received), float(failed)], device=self.mesh.device)
        number, any_failed = all_reduce(flags, self.mesh.world, dist.ReduceOp.MAX).tolist()
        return signal.Signals(int(number)).name if number else None, bool(any_failed)
