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

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megalard.errors import UserError
from tools.study.folder import Study
from tools.study.methods import METHODS
from tools.study.results import RESULTS, read_results, validation_loss
from tools.study.run import Run, execute


def run_all(
    title: str,
    runs: Sequence[Run],
    folder: Path,
    domain: str,
    device: str,
    shrink: int,
    workers: int,
    seconds: float,
) -> None:
    """Do the runs that have no result yet, and append each result to the file of results.

    Args:
        title: the title of the progress bar.
        folder, domain, device, shrink: as for ``Study``.
        workers: the number of processes, which take the GPUs in turn; with 1 the runs are done in
            this process.
        seconds: no run is started after this time.

    Raises:
        UserError: there is no teacher or no such text, or runs failed.
    """
    if not (folder / "teacher" / "config.json").exists():
        raise UserError(f"{folder} has no teacher: run the stage pretrain first")
    if not (folder / "corpus" / domain / "train").is_dir():
        raise UserError(f"{folder / 'corpus'} has no text of --domain {domain}: check its spelling")
    done = {result["key"] for result in read_results(folder)}
    missing = sorted((run for run in runs if run.key not in done), key=_order)
    start, failures = time.monotonic(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    work = partial(_execute_before, start + seconds)
    with (
        Progress(*columns, TimeElapsedColumn()) as bar,
        open(folder / RESULTS, "a", buffering=1) as file,
        _outcomes(work, missing, (folder, domain, device, shrink), workers) as outcomes,
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


def _order(run: Run) -> tuple[int, bool]:
    """Return a key that sorts runs by seed, and the longest runs of a seed first.

    If time runs out, all methods then lack the same seeds. No long run is left alone at the end.
    """
    is_long = run.method in METHODS and METHODS[run.method].is_long
    return run.seed, not is_long


@contextmanager
def _outcomes(
    work: Callable[[Run], dict | None], runs: Sequence[Run], study: tuple, workers: int
) -> Iterator[Iterator[tuple[Run, Callable[[], dict | None]]]]:
    """Yield runs in the order in which they end, each with a function that returns its result.

    Args:
        work: does a run.
        study: the arguments of ``Study``.
        workers: the number of processes; with 1 the runs are done in this process.
    """
    if workers == 1:
        _open_study(study)
        yield ((run, partial(work, run)) for run in runs)
        return
    context = multiprocessing.get_context("spawn")
    arguments = (study, context.Value("i", 0))
    with ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
        futures = {pool.submit(work, run): run for run in runs}
        yield ((futures[future], future.result) for future in as_completed(futures))


_study: Study


def _open_study(arguments: tuple) -> None:
    global _study
    _study = Study(*arguments)


def _start_worker(study: tuple, started) -> None:
    """Prepare a worker. ``started`` counts the workers, which take the GPUs in turn."""
    with started.get_lock():
        number = started.value
        started.value += 1
    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    _open_study(study)


def _execute_before(deadline: float, run: Run) -> dict | None:
    """Do a run, unless it is too late to start one."""
    return execute(_study, run) if time.monotonic() < deadline else None


def _describe(result: dict) -> str:
    text = result["key"]
    if "validation" in result:
        text += f"  validation loss {validation_loss(result):.4f}"
    if "seconds_per_step" in result:
        text += f"  {result['seconds_per_step'] * 1e3:.0f} ms per step"
    return text
