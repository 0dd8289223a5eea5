"""A process ends with its parent, however the parent ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from unittest.mock import MagicMock

import pytest

from megalard import parents
from tests.processes import descendants, is_running, started
from tests.ranks import wait_until

# A parent that starts a child, prints its number, and waits.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
assert child.stdout.readline() == "ready\\n"
print(child.pid, flush=True)
time.sleep(300)
"""
CHILD = """
import time
from megalard.parents import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_ends_with_its_parent(number):
    command = [sys.executable, "-c", PARENT, CHILD]
    with started(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert descendants(parent.pid) == [parent.pid, child]
        parent.send_signal(number)
        parent.wait(60)
        wait_until(lambda: not is_running(child), 60)


@pytest.mark.parametrize("parent", [100_001, 100_002])
def test_a_process_whose_parent_has_just_ended_ends_too(parent, monkeypatch):
    """The parent is 100,001 before the call, and after it the process may have another one."""
    answers, sent = iter([100_001, parent]), []
    monkeypatch.setattr(parents.os, "getppid", lambda: next(answers))
    monkeypatch.setattr(parents.os, "kill", lambda process, number: sent.append(number))
    monkeypatch.setattr(parents.ctypes, "CDLL", lambda *arguments, **options: MagicMock())
    parents.end_with_parent(signal.SIGINT)
    assert sent == ([] if parent == 100_001 else [signal.SIGINT])
