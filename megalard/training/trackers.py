"""Experiment trackers of others, wandb and trackio, which cannot end or delay a run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from megalard.errors import UserError
from megalard.files.writing import replace_text
from megalard.reporter import Reporter

# How long the end of a run waits until a tracker has sent what it has.
CLOSE_S = 60.0
_PROJECT = "megalard"
_ID_FILE = "tracker.json"

Values = Mapping[str, float]


class Tracker(Protocol):
    """What takes the values of reported steps."""

    def add(self, values: Values, step: int) -> None:
        """Take the values of a step."""

    def close(self) -> None:
        """Write or send what was taken."""


class TrackedRun(Protocol):
    """A run as wandb and trackio return it."""

    def log(self, values: Values, step: int | None = None) -> object:
        """Log the values of a step."""

    def finish(self) -> object:
        """End the run."""


def check_installed(trackers: Sequence[str]) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        UserError: the message names the package.
    """
    for name in trackers:
        if name in _STARTS and importlib.util.find_spec(name) is None:
            raise UserError(
                f"run.trackers names {name}, which is not installed: install it with "
                f"pip install {name}, or leave it out"
            )


def open_trackers(
    trackers: Sequence[str], output: Path, settings: dict, reporter: Reporter
) -> list[Tracker]:
    """Start the trackers of others that are named.

    Args:
        trackers: names of trackers; ``tensorboard`` is none of these.
        output: the output directory. A resumed run continues the tracked run of its directory.
        settings: the configuration, as plain dictionaries.
        reporter: prints warnings.
    """
    names = [name for name in trackers if name in _STARTS]
    if not names:
        return []
    run_id = _run_id(output)
    return [
        BackgroundTracker(name, partial(_STARTS[name], output, run_id, settings), reporter)
        for name in names
    ]


class BackgroundTracker:
    """Calls a tracker in a thread of its own, so that no step waits for a network.

    If the tracker fails, it is warned about once and gets nothing more.

    Args:
        name: the name of the tracker.
        start: imports the package and starts the tracked run; called in the thread.
        reporter: prints warnings.
        close_s: how long ``close`` waits for the tracker.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], TrackedRun],
        reporter: Reporter,
        close_s: float = CLOSE_S,
    ):
        self._name, self._start, self._reporter = name, start, reporter
        self._close_s, self._has_warned = close_s, False
        self._items: queue.Queue[tuple[Values, int] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, values: Values, step: int) -> None:
        """Take the values of a step."""
        if self._thread.is_alive():
            self._items.put((values, step))

    def close(self) -> None:
        """Wait until the tracker has what was added, for a limited time."""
        self._items.put(None)
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            self._warn(
                f"{self._name} has not taken all values after {self._close_s:g} s, so its last "
                "ones may be missing; metrics.jsonl has all of them"
            )

    def _run(self) -> None:
        try:
            run = self._start()
            for values, step in iter(self._items.get, None):
                run.log({name: x for name, x in values.items() if math.isfinite(x)}, step=step)
            run.finish()
        # Packages of others raise anything, SystemExit among it.
        except BaseException as error:
            self._warn(
                f"{self._name} failed and gets nothing more of this run "
                f"({type(error).__name__}: {error}); metrics.jsonl has all values"
            )

    def _warn(self, sentence: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._reporter.warning(sentence)


def _start_wandb(output: Path, run_id: str, settings: dict) -> TrackedRun:
    wandb: Any = importlib.import_module("wandb")
    return wandb.init(
        # These variables and the mode (WANDB_MODE=offline) are wandb's own.
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        name=output.absolute().name,
        id=run_id,
        resume="allow",
        config=settings,
        dir=str(output),
        # Otherwise it replaces sys.stdout of the trainer.
        settings=wandb.Settings(console="off"),
    )


def _start_trackio(output: Path, run_id: str, settings: dict) -> TrackedRun:
    trackio: Any = importlib.import_module("trackio")
    return trackio.init(
        project=_PROJECT,
        name=f"{output.absolute().name}-{run_id}",
        resume="allow",
        config=settings,
    )


_STARTS = {"wandb": _start_wandb, "trackio": _start_trackio}


def _run_id(output: Path) -> str:
    """Return what trackers know the run of this directory by; made at its first start."""
    file = output / _ID_FILE
    try:
        run_id = json.loads(file.read_text())["id"]
    except (OSError, ValueError, LookupError, TypeError):
        run_id = token_hex(4)
        replace_text(file, json.dumps({"id": run_id}) + "\n")
    return str(run_id)
