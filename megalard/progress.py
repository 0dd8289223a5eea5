"""Progress bars, drawn on rank 0 if stderr is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megalard.parallel.mesh import SINGLE, Axis


@contextmanager
def byte_bar(title: str, total: int | None, axis: Axis = SINGLE) -> Iterator[Callable[[int], None]]:
    """Draw a bar of ``total`` bytes, rank 0's share; yield a function that advances it.

    A total of None is not known.
    """
    columns = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    with _bar(title, total, columns, axis) as (bar, task):
        yield lambda count: bar.advance(task, count)
        bar.update(task, completed=total)


@contextmanager
def token_bar(total: int, axis: Axis = SINGLE) -> Iterator[Callable[[str, int], None]]:
    """Draw a bar of ``total`` tokens; yield a function that names and advances it."""
    with _bar("", total, (TaskProgressColumn(),), axis) as (bar, task):
        yield lambda name, tokens: bar.update(task, description=name, advance=tokens)


@contextmanager
def _bar(title: str, total: int | None, columns: tuple[ProgressColumn, ...], axis: Axis):
    console = Console(stderr=True)
    is_hidden = axis.rank != 0 or not console.is_terminal
    text = TextColumn("{task.description}")
    with Progress(
        text, BarColumn(), *columns, TimeRemainingColumn(), console=console, disable=is_hidden
    ) as bar:
        yield bar, bar.add_task(title, total=total)
