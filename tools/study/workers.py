"""One ``map`` over several processes, or over this one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def parallel_map(workers: int) -> Iterator[Callable]:
    """Yield a function like ``map`` that keeps the order of its items.

    The processes are spawned, because threads of tokenizers, which do not survive a fork, may have
    run in this process.

    Args:
        workers: the number of processes; with 1 the work is done in this process.
    """
    if workers == 1:
        yield lambda function, items, chunksize=1: map(function, items)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield pool.map
