"""Start commands as processes that never outlive a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

CHECKOUT = Path(__file__).parents[1]
# The limit is for what hangs: on busy cores a start of a few seconds has taken a minute.
LIMIT_S = 300


# Every process that a command starts, in whatever session and with whatever parent, inherits this
# variable with a value of its own.
_MARK = "MEGALARD_TEST_COMMAND"


@contextmanager
def started(command: Sequence[object], **options) -> Iterator[subprocess.Popen]:
    """Start a command, and kill at the end all that still runs of it.

    The command has the default action for SIGINT, even where the tests run in the background of a
    shell, which ignores SIGINT there. It has a session of its own, so that Ctrl-C in a terminal
    ends the tests alone.

    Args:
        options: as for ``subprocess.Popen``. ``env`` is in addition to the environment of the
            tests, in which this checkout is imported and a rank has one thread.
    """
    mark = token_hex(8)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), _MARK: mark}
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment | options.pop("env", {}),
        start_new_session=True,
        preexec_fn=_default_sigint,
        **options,
    )
    try:
        yield process
    finally:
        _kill([process.pid] if process.poll() is None else [])
        _kill(_marked(mark))
        process.wait()


def _default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished(command: Sequence[object], **options) -> subprocess.CompletedProcess:
    """Run a command to its end and return its status and its output as text."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    with started(command, **options) as process:
        output, errors = process.communicate(timeout=LIMIT_S)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def torchrun(ranks: int, *words: object) -> subprocess.CompletedProcess:
    """Run a module or a script of the project on several ranks, which must succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = finished([*command, f"--nproc-per-node={ranks}", *words], cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    return done


def descendants(pid: int) -> list[int]:
    """Return a process and all that it started, as far as they run and have not left it."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for t in threads for c in (t / "children").read_text().split()]
    except OSError:
        children = []
    return [pid] + [member for child in children for member in descendants(child)]


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def kill(process: subprocess.Popen) -> None:
    """Kill a process and all that it started, at once, as the loss of a machine does."""
    if process.poll() is None:
        _kill(descendants(process.pid))
        process.wait()


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    """Return the processes that inherited a mark."""
    entry, pids = f"{_MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if entry in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids
