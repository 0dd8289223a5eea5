"""Commands as a user gives them, in this process and on several ranks."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from megalard import cli
from megalard.errors import UserError
from tests.ranks import run_ranks

PREFIX = "megalard: error: "


# Written out, so that a command that is lost is noticed.
COMMANDS = (
    "train",
    "plan",
    "preflight",
    "evaluate",
    "report",
    "prepare",
    "convert",
    "inspect",
    "verify",
    "push",
)


def megalard(*words: object) -> int:
    """Run a command in this process; return its exit status."""
    return cli.main([str(word) for word in words])


def megalard_on_ranks(ranks: int, *words: object) -> None:
    """Run a command on several ranks, all of which must succeed."""
    run_ranks(ranks, _succeed, [str(word) for word in words])


def _succeed(words: list[str]) -> None:
    assert cli.main(words) == 0


def tool(name: str) -> Callable[..., int]:
    """Return a function that runs a script of ``tools/`` in this process."""
    module = importlib.import_module(f"tools.{name}")
    return lambda *words: module.main([str(word) for word in words])


def noted_bars(monkeypatch) -> dict[str, list[int]]:
    """Draw no bars of bytes; return for each, by title, its total and what advances it."""
    bars: dict[str, list[int]] = {}

    @contextmanager
    def bar(title: str, total: int):
        counts = bars[title] = [total]
        yield counts.append

    monkeypatch.setattr("megalard.progress.byte_bar", bar)
    return bars


def refusal(capsys, *words: object) -> str:
    """Run a command that must find bad input; return the one line that it prints on stderr."""
    capsys.readouterr()
    assert megalard(*words) == 1
    return one_error(capsys.readouterr().err)


def one_error(printed: str) -> str:
    """Return the error line of a command. Nothing may follow it, and there must be only one."""
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed)
    lines = [line for line in printed.splitlines() if line.startswith(PREFIX)]
    assert len(lines) == 1 and "Traceback" not in printed, printed
    assert printed.rstrip().endswith(lines[0]), "the sentence runs over several lines"
    return lines[0]


def user_error(function: Callable, *arguments, **options) -> str:
    """Call a function that must raise a ``UserError``; return its sentence, which is one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
