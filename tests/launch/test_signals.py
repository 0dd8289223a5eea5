"""Signals to train.sh, before and while there are ranks, and after a rank has failed."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tests.jobs import steps_reported, train
from tests.launch.nodes import (
    STEPS,
    STOPS_WHEN_ASKED,
    changed_trainer,
    handles,
    run_settings,
    stand_in,
    words_of,
)
from tests.processes import LIMIT_S, descendants, is_running
from tests.ranks import wait_until

SIGTERM, SIGUSR1 = signal.SIGTERM, signal.SIGUSR1


def has_launcher(node) -> bool:
    """Whether train.sh has started torchrun."""
    for pid in descendants(node.process.pid):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                if "megalard.launcher" in file.read():
                    return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1], ids=lambda number: number.name)
def test_a_signal_before_there_are_ranks_ends_the_run_with_0(number, job, tmp_path, start):
    """In the script, which has nothing to save, and in torchrun.

    torchrun ends, or its ranks get the signal, if they start within three seconds.
    """
    words = words_of(job, tmp_path / "output", "--gpus", "2", "--max-restarts", "2")
    environment = stand_in(tmp_path, STOPS_WHEN_ASKED)
    node = start(words, tmp_path / "script", **environment)
    node.wait(lambda: handles(node.process.pid, number))
    node.process.send_signal(number)
    node.succeed()
    assert (tmp_path / "script").read_text() == f"{number.name}: stopped; nothing to save\n"

    node = start(words, tmp_path / "torchrun", **environment)
    node.wait(lambda: has_launcher(node))
    assert not node.ranks()
    node.process.send_signal(number)
    node.succeed()
    printed = (tmp_path / "torchrun").read_text()
    if "stopped while no ranks were running" not in printed:
        assert printed == "" and {path.name for path in tmp_path.glob("0-*")} == {"0-0", "0-1"}


def before_torchrun_was_ended(log) -> str:
    """Return what a log holds, without what train.sh adds when it ends torchrun.

    It does so when there have been no ranks for three seconds, which torchrun may take to end by
    itself on busy cores.
    """
    end = r"(\[1\].* Terminated .*\n)?SIG\w+: stopped while no ranks were running\n$"
    return re.sub(end, "", log.read_text())


# The trainer before it is imported, and when all is ready for the first step.
WAITS_TWICE = """
(FOLDER / "started").touch()
wait_for(FOLDER / "signalled")

from megalard import train

def wait(run):
    (FOLDER / "ready").touch()
    wait_for(FOLDER / "never")

train.report_start = wait
"""


def test_a_signal_before_the_first_step_ends_the_run_with_0(job, tmp_path, start):
    """When the rank has no handler yet, and when it has one; the same output is then used."""
    output, log, environment = (
        job / "early",
        job / "early.log",
        changed_trainer(tmp_path, WAITS_TWICE),
    )
    words = words_of(job, output, "--gpus", "1", "--max-restarts", "2")
    node = start(words, log, **environment)
    node.wait((tmp_path / "started").exists)
    assert not any(handles(pid, SIGUSR1) for pid in node.ranks())
    node.process.send_signal(SIGUSR1)
    (tmp_path / "signalled").touch()
    node.succeed()
    assert before_torchrun_was_ended(log) == "SIGUSR1: stopped; nothing to save\n"

    node = start(words, log, **environment)
    node.wait((tmp_path / "ready").exists)
    assert any(handles(pid, SIGTERM) for pid in node.ranks())
    node.process.send_signal(SIGTERM)
    node.succeed()
    printed = before_torchrun_was_ended(log)
    assert "error" not in printed and "Traceback" not in printed
    assert printed.endswith("SIGTERM: stopped; nothing to save\n")
    assert not steps_reported(output)

    train(run_settings(job, output))
    assert steps_reported(output) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_signal_to_a_run_that_has_just_failed(restarts, job, tmp_path, start):
    """The signal stops ranks that start again, and does not hide a failure."""
    options = ("--gpus", "2", "--max-restarts", str(restarts))
    words = words_of(job, tmp_path / "output", *options)
    node = start(words, tmp_path / "log", **stand_in(tmp_path, STOPS_WHEN_ASKED))
    node.wait(lambda: (tmp_path / "0-0").exists() and (tmp_path / "0-1").exists())
    os.kill(node.ranks()[1], signal.SIGKILL)
    time.sleep(0.1)
    node.process.send_signal(SIGTERM)
    # The status of a run that a signal ended is 128 + its number.
    expected = 0 if restarts else 128 + signal.SIGKILL
    assert node.status() == expected, node.log.read_text()[-4000:]


def test_ctrl_c_lets_the_ranks_end(job, tmp_path, start):
    words = words_of(job, tmp_path / "output", "--gpus", "1")
    node = start(words, tmp_path / "log", **stand_in(tmp_path, STOPS_WHEN_ASKED))
    node.wait((tmp_path / "0-0").exists)
    node.process.send_signal(signal.SIGINT)
    node.succeed()
    assert (tmp_path / "log").read_text() == (
        "train.sh: saving a checkpoint and stopping; Ctrl-C again ends the run without saving\n"
    )


def test_a_second_ctrl_c_ends_at_once(job, tmp_path, start):
    words = words_of(job, tmp_path / "output", "--gpus", "2")
    node = start(words, tmp_path / "log", **stand_in(tmp_path, STOPS_WHEN_ASKED))
    node.wait(lambda: (tmp_path / "0-0").exists() and (tmp_path / "0-1").exists())
    # A rank that stands still cannot save.
    ranks = node.ranks()
    os.kill(ranks[0], signal.SIGSTOP)
    node.process.send_signal(signal.SIGINT)
    node.wait(lambda: not is_running(ranks[1]))
    node.process.send_signal(signal.SIGINT)
    assert node.status() == 130
    wait_until(lambda: not any(map(is_running, ranks)), LIMIT_S)
