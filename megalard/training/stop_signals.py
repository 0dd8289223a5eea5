"""Stop when asked to: SIGTERM and SIGUSR1, which Slurm sends ahead of a time limit."""

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

# Within this time the signal reaches all ranks, so that no rank takes the end of another for a
# failure.
_DELIVERY_S = 1.0
# The time that a main thread gets to end by itself and remove its temporary files.
_PATIENCE_S = 5.0


class _Phase(Enum):
    NOTHING_TO_SAVE = auto()  # a signal ends the process
    ENDING = auto()
    ENTERING = auto()  # the steps are about to begin; other ranks may be ending
    STEPPING = auto()  # a signal waits for the end of the step
    OVER = auto()  # a signal was obeyed, or a failure, which it must not hide, ends the run


class StopSignals:
    """Handle stop signals; a ``with`` statement around the entire run.

    During steps a signal asks the run to stop after the step. Before and after the steps there is
    nothing to save, and a signal ends the process: by ``SystemExit`` if the main thread runs Python
    code, and by a thread if the main thread waits inside a library for a rank that has ended, where
    Python calls no signal handler. Signals after the first have no effect.

    Args:
        status: the exit status of the process if there was nothing to save.
    """

    def __init__(self, status: int = 0):
        self._status = status
        self._phase = _Phase.NOTHING_TO_SAVE
        self._received = 0
        self._is_reported = False
        self._previous_handlers: dict = {}
        self._side_stream: torch.cuda.Stream | None = None

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread install handlers.
        if threading.current_thread() is threading.main_thread():
            self._read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
            self._previous_handlers = {
                number: signal.signal(number, self._handle) for number in SIGNALS
            }
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        has_failed = kind is not None and issubclass(kind, Exception)
        was_stopped = has_failed and self._received and self._phase is not _Phase.OVER
        self._phase = _Phase.OVER
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if self._previous_handlers:
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._write_end)
        if was_stopped:
            # The failure is that another rank obeyed the signal earlier and has ended.
            self._report()
            raise SystemExit(self._status) from None

    def _handle(self, number: int, frame: object) -> None:
        """Handle a signal; Python calls this in the main thread, between two instructions."""
        if self._phase is _Phase.NOTHING_TO_SAVE:
            self._phase = _Phase.ENDING
            self._received = self._received or number
            time.sleep(_DELIVERY_S)
            self._report()
            raise SystemExit(self._status)

    def _listen(self) -> None:
        numbers = iter(lambda: os.read(self._read_end, 1), b"")
        number = next((number[0] for number in numbers if number[0] in SIGNALS), 0)
        self._received = self._received or number
        while number and self._phase is not _Phase.OVER:
            time.sleep(_PATIENCE_S)
            if self._phase not in (_Phase.STEPPING, _Phase.OVER):
                self._report()
                sys.stdout.flush()
                os._exit(self._status)
        os.close(self._read_end)

    def _report(self) -> None:
        if os.environ.get("RANK", "0") == "0" and not self._is_reported:
            self._is_reported = True
            name = signal.Signals(self._received).name
            print(f"{name}: stopped; nothing to save", flush=True)

    @contextmanager
    def after_each_step(self, mesh: Mesh) -> Iterator[None]:
        """Let signals wait for the next call of ``agreed`` during the block; a collective call."""
        if mesh.device.type == "cuda":
            self._side_stream = torch.cuda.Stream(mesh.device)
        # All ranks enter together. A rank that received a signal before then ends in this call.
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

    def agreed(self, mesh: Mesh, has_failed: bool) -> tuple[str | None, bool]:
        """Return the signal that any rank received, and whether ``has_failed`` is true on any rank.

        All ranks call this after every step, so that they stop after the same step. It does not
        wait for what the step has queued on the GPU.
        """
        with torch.cuda.stream(self._side_stream):
            flags = torch.tensor([float(self._received), float(has_failed)], device=mesh.device)
            number, any_failed = all_reduce(flags, mesh.world, dist.ReduceOp.MAX).tolist()
        if number:
            self._phase = _Phase.OVER
        return signal.Signals(int(number)).name if number else None, bool(any_failed)
