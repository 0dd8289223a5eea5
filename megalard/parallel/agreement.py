"""Errors of one rank become errors of all ranks, so that all stop and one of them reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from megalard.errors import UserError
from megalard.parallel.mesh import Axis

T = TypeVar("T")


@contextmanager
def checked_on_all_ranks(axis: Axis) -> Iterator[None]:
    """Run a block on every rank; a ``UserError`` on any rank is raised on all of them.

    Every rank must enter, and nothing in the block may wait for another rank.
    """
    sentence: str | None = None
    try:
        yield
    except UserError as error:
        sentence = str(error)
    for other_sentence in gather_objects(sentence, axis):
        if other_sentence is not None:
            raise UserError(other_sentence)


@contextmanager
def checked_meanwhile(check: Callable[[], object], axis: Axis) -> Iterator[Callable[[], None]]:
    """Run a check in a thread while the block runs; yield a function that waits for the check.

    The check communicates with no other rank. All ranks call the wait, and a ``UserError`` of the
    check on any rank is then raised on all of them.
    """
    with ThreadPoolExecutor(1) as thread:
        checking = thread.submit(check)

        def wait() -> None:
            with checked_on_all_ranks(axis):
                checking.result()

        yield wait


def gather_objects(value: T, axis: Axis) -> list[T]:
    """Return the small Python objects of all ranks, on every rank, in the order of ranks."""
    if axis.size == 1:
        return [value]
    values: list = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def from_rank_0(value: T | None, axis: Axis) -> T:
    """Return rank 0's small Python object on every rank."""
    return gather_objects(value, axis)[0]
