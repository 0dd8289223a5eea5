"""Stopping when asked to: SIGTERM and SIGUSR1, which Slurm sends ahead of a time limit."""

from __future__ import annotations

import os
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
    there is nothing to save, a signal ends the process at once. Either way the status is 0.

    A thread listens: the main one may be waiting for another rank, inside of a library, where
    Python calls no handler.
    """

    def __init__(self) -> None:
        self._received = 0
        self._stepping = False
        self._before: dict = {}

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread choose who listens
        if threading.current_thread() is threading.main_thread():
            self._listening, self._told = os.pipe()
            os.set_blocking(self._told, False)
            self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
            # without a handler of Python's the numbers do not come through the pipe
            self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._told_before)
            os.close(self._told)

    def _listen(self) -> None:
        while number := os.read(self._listening, 1):
            if number[0] in SIGNALS and not self._received:
                self._received = number[0]
                if not self._stepping:
                    self._end()
        os.close(self._listening)

    def _end(self) -> None:
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(self._received).name
            print(f"{name}: stopped; nothing to save", flush=True)
        sys.stdout.flush()
        os._exit(0)

    @contextmanager
    def after_a_step(self, mesh: Mesh) -> Iterator[None]:
        """In this block the signals wait for ``agreed``; a collective call."""
        # all ranks pass from ending at once to waiting together: none waits for one that ended
        self.agreed(mesh, False)
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def agreed(self, mesh: Mesh, failed: bool) -> tuple[str | None, bool]:
        """The signal any rank was sent, and whether ``failed`` holds on any of them.

        A collective call after every step, so that all ranks stop after the same one.
        """
        flags = torch.tensor([float(self._received), float(failed)], device=mesh.device)
        number, any_failed = all_reduce(flags, mesh.world, dist.ReduceOp.MAX).tolist()
        return signal.Signals(int(number)).name if number else None, bool(any_failed)
