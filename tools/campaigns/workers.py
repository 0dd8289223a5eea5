"""Processes that try cases: forked, given one seed after another, and watched.

A case may end the process that tries it, where a library aborts or the system has no memory left,
or never come back from a call into a library. Either is an outcome like any other. A new process
takes the place of the one that is gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait

from tools.campaigns.tally import Outcome

_PROGRESS_S = 10.0
# Far above the limit of a command (trial.LIMIT_S), of which a case has a few.
CASE_LIMIT_S = 900.0

Try = Callable[[int], Iterable[Outcome]]


class _Worker:
    """A process that tries cases.

    Attributes:
        seed: the case that it tries; None if it waits for one.
        since: when it was given the case.
    """

    def __init__(self, number: int, begin: Callable[[int], Try], others: list[_Worker]):
        self.connection, theirs = multiprocessing.Pipe()
        # With the ends of other pipes open, no process would learn that the parent has ended.
        inherited = [self.connection, *(other.connection for other in others)]
        self.process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(number, begin, theirs, inherited)
        )
        self.process.start()
        theirs.close()
        self.number, self.since = number, 0.0
        self.seed: int | None = None

    def give(self, seed: int) -> None:
        """Have the process try a case."""
        self.seed, self.since = seed, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # ``take`` then says that the process ended
            self.connection.send(seed)

    def take(self) -> list[Outcome]:
        """Return the outcomes of the case, which the process has sent unless it has ended."""
        try:
            outcomes = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            outcomes = [Outcome("ended", False, "", f"the process ended: {self._status()}")]
        self.seed = None
        return outcomes

    def stop(self) -> None:
        """End the process, also one that tries a case."""
        self.connection.close()
        if self.seed is not None and self.process.is_alive():
            self.process.kill()
        self.process.join()

    def _status(self) -> str:
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"status {code}"


def _serve(
    number: int, begin: Callable[[int], Try], connection: Connection, inherited: list[Connection]
) -> None:
    """Try the cases that are sent, in a forked process."""
    for other in inherited:
        other.close()
    try:
        attempt = begin(number)
        while True:
            connection.send(list(attempt(connection.recv())))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        # Nothing of the parent's is closed or flushed a second time.
        os._exit(0)


def outcomes_of(
    seeds: range, begin: Callable[[int], Try], jobs: int, minutes: float
) -> Iterator[tuple[int, list[Outcome]]]:
    """Yield each seed with the outcomes of its case; show progress on stderr.

    Args:
        seeds: the seeds of the cases, which are given out in this order.
        begin: called in each process with the number of the process; returns what tries a case.
        jobs: the number of processes.
        minutes: no further case is begun after this time; 0 for no limit.
    """
    start = shown = time.monotonic()
    left, num_cases, num_bad = iter(seeds), 0, 0
    is_late = False
    workers: list[_Worker] = []
    try:
        while True:
            for number in range(min(jobs, len(seeds))):
                if len(workers) <= number:
                    workers.append(_Worker(number, begin, workers))
                if workers[number].seed is not None or is_late:
                    continue
                if minutes and time.monotonic() - start > 60 * minutes:
                    is_late = True
                    if (seed := next(left, None)) is not None:
                        print(f"stopped before seed {seed}, after {minutes:g} minutes", flush=True)
                elif (seed := next(left, None)) is not None:
                    workers[number].give(seed)
            busy = [worker for worker in workers if worker.seed is not None]
            if not busy:
                return
            ready = wait([worker.connection for worker in busy], timeout=_PROGRESS_S)
            now = time.monotonic()
            for worker in busy:
                seed = worker.seed
                assert seed is not None
                if worker.connection in ready:
                    outcomes = worker.take()
                elif now - worker.since > CASE_LIMIT_S:
                    worker.stop()
                    outcomes = [
                        Outcome("hang", False, "", f"it took more than {CASE_LIMIT_S:.0f} s")
                    ]
                else:
                    continue
                if not worker.process.is_alive():
                    others = [other for other in workers if other is not worker]
                    workers[worker.number] = _Worker(worker.number, begin, others)
                num_cases += 1
                num_bad += any(not outcome.is_good for outcome in outcomes)
                yield seed, outcomes
            if now - shown > _PROGRESS_S:
                shown = now
                print(f"{num_cases} cases in {now - start:.0f} s, {num_bad} bad", file=sys.stderr)
    finally:
        for worker in workers:
            worker.stop()
