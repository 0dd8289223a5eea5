"""A progress bar for work counted in bytes, on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megalard.parallel.mesh import SINGLE, Axis


@contextmanager
def progress_bar(title: str, total: int, axis: Axis = SINGLE) -> Iterator[Callable[[int], None]]:
    """A bar of the ``total`` bytes that are rank 0's part; yields what it advances by.

    Nothing is drawn on other ranks, or where there is no terminal.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    disable = axis.rank != 0 or not console.is_terminal
    with Progress(*columns, console=console, disable=disable) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
        bar.update(task, completed=total)
