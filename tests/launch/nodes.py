"""Start the launch scripts as nodes of a job: one start of ``train.sh`` is one node."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.jobs import arguments
from tests.processes import CHECKOUT, LIMIT_S, descendants, started

LAUNCH = CHECKOUT / "launch"
TRAIN, SLURM = LAUNCH / "train.sh", LAUNCH / "slurm.sbatch"
# A node that is lost during the run has some of these steps left.
STEPS = 12
ENDLESS = ("optimizer.steps=20000", "checkpoint.save_every=0")
# What train.sh has options for.
_REQUIRED = ("--model.teacher=", "--data.paths=", "--run.output=")


def run_settings(job: Path, output: Path, *settings: str) -> list[str]:
    """Return the trainer's arguments of a run."""
    # A real trainer imports tensorboard for almost a second.
    options = (f"optimizer.steps={STEPS}", "checkpoint.save_every=5", "run.trackers=[]")
    return arguments(job, output, *options, *settings)


def words_of(job: Path, output: Path, *options: str, settings: tuple[str, ...] = ()) -> list[str]:
    """Return the words for train.sh that start a run: options, and settings after ``--``."""
    words = run_settings(job, output, *settings)
    rest = [word for word in words if not word.startswith(_REQUIRED)]
    paths = ["--model", str(job / "model"), "--data", str(job / "train.txt")]
    return [*paths, "--output", str(output), *options, "--", *rest]


@dataclass(frozen=True)
class Node:
    """A script that was started, with all its processes.

    Attributes:
        log: the file that the script's output is appended to.
    """

    process: subprocess.Popen
    log: Path

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait for a condition that the node makes true while it runs."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            is_in_time = self.process.poll() is None and time.monotonic() < deadline
            assert is_in_time, self.log.read_text()[-4000:]
            time.sleep(0.05)

    def wait_for(self, pattern: str, path: Path | None = None) -> None:
        """Wait until a file, or the log, contains a pattern."""
        path = path or self.log
        self.wait(lambda: path.exists() and re.search(pattern, path.read_text()))

    def status(self) -> int:
        """Wait for the end of the script; return its exit status."""
        return self.process.wait(LIMIT_S)

    def succeed(self) -> None:
        """Wait for the end of the script, whose exit status must be 0."""
        assert self.status() == 0, self.log.read_text()[-4000:]

    def ranks(self) -> list[int]:
        """Return the processes that torchrun started, in the order of their ranks."""
        pids = {}
        for pid in descendants(self.process.pid):
            words = environment_of(pid)
            pids |= {word: pid for word in words if word.startswith(b"RANK=")}
        return [pids[word] for word in sorted(pids)]


def environment_of(pid: int) -> list[bytes]:
    """Return the environment that a process was started with; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)


@contextmanager
def started_nodes() -> Iterator[Callable[..., Node]]:
    """A function that starts a script as a node; all nodes are killed at the end."""
    with ExitStack() as stack:

        def start(
            words: Sequence[str],
            log: Path,
            script: Path = TRAIN,
            before: Sequence[str] = (),
            **environment: str,
        ) -> Node:
            """Start a script in a folder that is not the checkout.

            Args:
                before: what runs the script, before its name.
            """
            file = stack.enter_context(open(log, "ab"))
            options = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": log.parent}
            environment = {"PYTHON": sys.executable, **environment}
            command = [*before, "bash", script, *words]
            return Node(stack.enter_context(started(command, env=environment, **options)), log)

        yield start


def stand_in(folder: Path, body: str) -> dict[str, str]:
    """Return an environment in which torchrun starts a small program in place of each rank.

    The program needs no trainer, so that it starts at once.
    """
    path = folder / "rank"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return {"PYTHON_EXEC": str(path), "STAND_IN_FOLDER": str(folder)}


# torchrun starts a rank as ``PYTHON -u -m megalard.train ARGUMENTS``.
_RUN_TRAINER = """
from megalard.train import main
main(sys.argv[4:])
"""


def changed_trainer(folder: Path, change: str) -> dict[str, str]:
    """Return an environment in which every rank is the trainer after a change to its modules.

    Args:
        change: a program that runs first. It may use ``os``, ``sys``, ``Path``, ``wait_for``, which
            waits for a path to exist, and ``FOLDER``, which is ``folder``.
    """
    return stand_in(folder, _TOOLS + change + _RUN_TRAINER)


_TOOLS = """
import os, sys, time
from pathlib import Path

FOLDER = Path(os.environ["STAND_IN_FOLDER"])

def wait_for(path):
    while not path.exists():
        time.sleep(0.02)
"""


# A rank that notes that it runs and ends with status 0 after a signal, as the trainer does.
STOPS_WHEN_ASKED = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: sys.exit(0))
name = os.environ["TORCHELASTIC_RESTART_COUNT"] + "-" + os.environ["RANK"]
open(os.path.join(os.environ["STAND_IN_FOLDER"], name), "w").close()
time.sleep(600)
"""
