"""Stopping when asked to: SIGTERM and SIGUSR1, which Slurm sends ahead of a time limit."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto

import torch
import torch.distributed as dist

from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# Before the first rank ends, all of them have been told, so that none takes it for a failure.
_ALL_TOLD_S = 1.0
# What a main thread gets to end by itself, removing its temporary files.
_PATIENCE_S = 5.0


class _Phase(Enum):
    NOTHING_TO_SAVE = auto()  # a signal ends the process
    ENDING = auto()
    ENTERING = auto()  # the steps; other ranks may have ended instead
    STEPPING = auto()  # a signal waits for the end of the step
    OVER = auto()  # it was acted on, or something failed, which it must not hide


class StopSignals:
    """What a run does with the signals, in a ``with`` statement around all of it.

    While it takes steps, a signal asks it to stop after the step. Before and after, where there is
    nothing to save, a signal ends the process: by ``SystemExit`` where the main thread runs, by a
    thread where it waits inside of a library, for a rank that has ended, and Python calls no
    handler. Signals after the first change nothing.

    Args:
        status: the process's, where there was nothing to save.
    """

    def __init__(self, status: int = 0):
        self._status = status
        self._phase = _Phase.NOTHING_TO_SAVE
        self._received = 0
        self._reported = False
        self._before: dict = {}
        self._aside: torch.cuda.Stream | None = None

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread choose who listens
        if threading.current_thread() is threading.main_thread():
            self._listening, self._told = os.pipe()
            os.set_blocking(self._told, False)
            self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, Exception)
        ending = failed and self._received and self._phase is not _Phase.OVER
        self._phase = _Phase.OVER
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._told_before)
            os.close(self._told)
        if ending:
            # of another rank, which was told before and has ended
            self._report()
            raise SystemExit(self._status) from None

    def _handle(self, number: int, frame: object) -> None:
        """In the main thread, between two of its instructions."""
        if self._phase is _Phase.NOTHING_TO_SAVE:
            self._phase = _Phase.ENDING
            self._received = self._received or number
            time.sleep(_ALL_TOLD_S)
            self._report()
            raise SystemExit(self._status)

    def _listen(self) -> None:
        numbers = iter(lambda: os.read(self._listening, 1), b"")
        number = next((number[0] for number in numbers if number[0] in SIGNALS), 0)
        self._received = self._received or number
        while number and self._phase is not _Phase.OVER:
            time.sleep(_PATIENCE_S)
            if self._phase not in (_Phase.STEPPING, _Phase.OVER):
                self._report()
                sys.stdout.flush()
                os._exit(self._status)
        os.close(self._listening)

    def _report(self) -> None:
        if os.environ.get("RANK", "0") == "0" and not self._reported:
            self._reported = True
            name = signal.Signals(self._received).name
            print(f"{name}: stopped; nothing to save", flush=True)

    @contextmanager
    def after_a_step(self, mesh: Mesh) -> Iterator[None]:
        """In this block the signals wait for ``agreed``; a collective call."""
        if mesh.device.type == "cuda":
            self._aside = torch.cuda.Stream(mesh.device)
        # all ranks begin to wait for steps together, or those that are told before end here
        self._phase = _Phase.ENTERING
        all_reduce(torch.zeros(1, device=mesh.device), mesh.world).item()
        self._phase = _Phase.STEPPING
        try:
            yield
        except BaseException:
            self._phase = _Phase.OVER
            raise
        if self._phase is _Phase.STEPPING:
            self._phase = _Phase.NOTHING_TO_SAVE

    def agreed(self, mesh: Mesh, failed: bool) -> tuple[str | None, bool]:
        """The signal any rank was sent, and whether ``failed`` holds on any of them.

        A collective call after every step, so that all ranks stop after the same one. It does not
        wait for what the step has queued on the GPU.
        """
        with torch.cuda.stream(self._aside):
            flags = torch.tensor([float(self._received), float(failed)], device=mesh.device)
            number, any_failed = all_reduce(flags, mesh.world, dist.ReduceOp.MAX).tolist()
        if number:
            self._phase = _Phase.OVER
        return signal.Signals(int(number)).name if number else None, bool(any_failed)
