"""Runs of the study, one after the other or several at a time, with results as they come."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megalard.errors import UserError
from tools.study.results import RESULTS, read_results


class AnyRun(Protocol):
    """The description of a run.

    Attributes:
        key: its name in the file of results.
        order: runs are started in this order.
    """

    @property
    def key(self) -> str: ...

    @property
    def order(self) -> tuple: ...


def run_all(
    title: str,
    runs: Sequence[AnyRun],
    folder: Path,
    open_study: Callable[[], object],
    execute: Callable[[Any, Any], dict],
    workers: int,
    seconds: float,
) -> None:
    """Do the runs that have no result yet, and append each result to the file of results.

    Args:
        title: the title of the progress bar.
        folder: the directory of the study.
        open_study: opens what ``execute`` works with; every process calls it once.
        execute: does a run of the study, and returns its result as JSON takes it.
        workers: the number of processes, which take the GPUs in turn; with 1 the runs are done in
            this process.
        seconds: no run is started after this time.

    Raises:
        UserError: runs failed.
    """
    done = {result["key"] for result in read_results(folder)}
    missing = sorted((run for run in runs if run.key not in done), key=lambda run: run.order)
    start, failures = time.monotonic(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    work = partial(_execute_before, execute, start + seconds)
    with (
        Progress(*columns, TimeElapsedColumn()) as bar,
        open(folder / RESULTS, "a", buffering=1) as file,
        _outcomes(work, missing, open_study, workers) as outcomes,
    ):
        task = bar.add_task(title, total=len(missing))
        for run, outcome in outcomes:
            try:
                result = outcome()
            except Exception as error:
                failures += 1
                bar.console.print(f"{run.key} failed: {error!r}", markup=False, highlight=False)
                continue
            finally:
                bar.advance(task)
            if result is not None:
                file.write(json.dumps(result) + "\n")
                elapsed = time.monotonic() - start
                bar.console.print(f"{elapsed:6.0f} s  {_describe(result)}", highlight=False)
    if failures:
        raise UserError(
            f"{failures} of {len(missing)} runs failed, as printed above: the same command tries "
            "them again"
        )


@contextmanager
def _outcomes(
    work: Callable[[AnyRun], dict | None],
    runs: Sequence[AnyRun],
    open_study: Callable[[], object],
    workers: int,
) -> Iterator[Iterator[tuple[AnyRun, Callable[[], dict | None]]]]:
    """Yield runs in the order in which they end, each with a function that returns its result.

    Args:
        work: does a run.
        open_study: as for ``run_all``.
        workers: the number of processes; with 1 the runs are done in this process.
    """
    if workers == 1:
        _open(open_study)
        yield ((run, partial(work, run)) for run in runs)
        return
    context = multiprocessing.get_context("spawn")
    arguments = (open_study, context.Value("i", 0))
    with ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
        futures = {pool.submit(work, run): run for run in runs}
        yield ((futures[future], future.result) for future in as_completed(futures))


_study: object


def _open(open_study: Callable[[], object]) -> None:
    global _study
    _study = open_study()


def _start_worker(open_study: Callable[[], object], started) -> None:
    """Prepare a worker. ``started`` counts the workers, which take the GPUs in turn."""
    with started.get_lock():
        number = started.value
        started.value += 1
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = gpus.split(",") if gpus else list(map(str, range(torch.cuda.device_count())))
    if len(names) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]
    _open(open_study)


def _execute_before(
    execute: Callable[[Any, Any], dict], deadline: float, run: AnyRun
) -> dict | None:
    """Do a run, unless it is too late to start one."""
    return execute(_study, run) if time.monotonic() < deadline else None


def _describe(result: dict) -> str:
    text = result["key"]
    if "loss" in result:
        text += f"  training loss {result['loss']:.4f}"
    if "seconds_per_step" in result:
        text += f"  {result['seconds_per_step'] * 1e3:.0f} ms per step"
    return text
