"""Run a command in this process, with a limit, and judge how it ended.

A command ends well if it succeeds, or if it refuses in one sentence.
"""

from __future__ import annotations

import contextlib
import io
import re
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megalard import cli

LIMIT_S = 60
_LONGEST = 2200
_PREFIX = "megalard: error: "
GOOD = ("done", "refused")


class TooLate(BaseException):
    """Raised inside a command when its time is over."""


@dataclass(frozen=True)
class Trial:
    """How a command ended.

    Attributes:
        kind: ``done``, ``refused``, or a fault: ``traceback``, ``hang``, ``control characters`` or
            ``no sentence``.
        status: the exit status; None if there is none.
        detail: the sentence of a refusal, or the evidence of a fault.
        printed: what the command printed.
    """

    kind: str
    status: int | None
    detail: str
    printed: str

    @property
    def is_good(self) -> bool:
        return self.kind in GOOD


def try_command(words: Sequence[object], limit_s: int = LIMIT_S) -> Trial:
    """Run ``megalard WORDS``."""
    return try_call(lambda: cli.main([str(word) for word in words]), limit_s)


def try_call(function: Callable[[], int | None], limit_s: int = LIMIT_S) -> Trial:
    """Call a function that returns an exit status."""
    out, err = io.StringIO(), io.StringIO()
    status: int | None = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limit(limit_s):
            status = function() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except TooLate:
        return Trial("hang", None, f"it took more than {limit_s} s", err.getvalue())
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename}:{where.lineno}"
        detail = f"{type(error).__name__}: {str(error)[:200]} at {place}"
        return Trial("traceback", None, detail, err.getvalue())
    return judge(status, out.getvalue(), err.getvalue())


def judge(status: int, out: str, err: str) -> Trial:
    """Return how a command ended, from its exit status and its output."""
    printed = out + err
    if "Traceback (most recent call last)" in printed:
        return Trial("traceback", status, err[-400:], printed)
    if any(not (c.isprintable() or c in "\n\r\t") for c in _without_colors(printed)):
        return Trial("control characters", status, repr(printed[-400:]), printed)
    if status == 0:
        return Trial("done", 0, "", printed)
    lines = [line for line in err.splitlines() if line.strip()]
    sentences = [line for line in lines if line.startswith(_PREFIX)]
    last = lines[-1] if lines else ""
    is_usage = status == 2 and ": error: " in last
    is_sentence = len(sentences) == 1 and last == sentences[0] and len(last) < _LONGEST
    # inspect and verify report what they find on stdout, with status 1.
    is_report = status == 1 and not err.strip() and bool(out.strip())
    if is_usage or is_sentence or is_report:
        return Trial("refused", status, last or out[-200:], printed)
    return Trial("no sentence", status, (err or out)[-400:], printed)


def _without_colors(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@contextlib.contextmanager
def _limit(limit_s: int):
    def late(number, frame):
        raise TooLate

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
