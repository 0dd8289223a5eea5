"""Errors of one rank made the errors of all, so that every rank stops and one rank says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch.distributed as dist

from megalard.errors import UserError
from megalard.parallel.mesh import Axis


@contextmanager
def checked_on_all_ranks(world: Axis) -> Iterator[None]:
    """Run a block on every rank; a ``UserError`` on any of them is raised on all of them.

    Usable only where every rank enters, and nothing in the block waits for another rank.
    """
    error: str | None = None
    try:
        yield
    except UserError as raised:
        error = str(raised)
    for sentence in gather_objects(error, world):
        if sentence is not None:
            raise UserError(sentence)


@contextmanager
def checked_meanwhile(check: Callable[[], object], axis: Axis) -> Iterator[Callable[[], None]]:
    """Run a check in a thread beside the block; yields a wait, in which all ranks join.

    The check talks to no other rank. A ``UserError`` of it on any rank is raised by the wait on all
    of them.
    """
    with ThreadPoolExecutor(1) as thread:
        checking = thread.submit(check)

        def wait() -> None:
            with checked_on_all_ranks(axis):
                checking.result()

        yield wait


def gather_objects(value, axis: Axis) -> list:
    """Every rank's small Python object, on every rank, in the order of ranks."""
    if axis.size == 1:
        return [value]
    values = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values
