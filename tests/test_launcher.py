"""The launcher: torchrun that opens no port on one node and prints the reason of a failure last."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalard.launcher import _report
from tests.processes import CHECKOUT, LIMIT_S, descendants, is_running, started
from tests.ranks import SERVER, kill, wait_until

# What each rank does, in a script.
JOIN = """
import os, torch.distributed as dist
from megalard.parallel.mesh import build_mesh
mesh = build_mesh("cpu", int(os.environ["WORLD_SIZE"]))
total = __import__("torch").ones(1)
dist.all_reduce(total)
import sys
# One call, so that the lines of two ranks do not mix.
sys.stdout.write(f"sum {int(total)}\\n")
sys.stdout.flush()
END
dist.destroy_process_group()
"""
BAD_INPUT = """
import os, sys
from megalard import cli
from megalard.errors import UserError
def fail():
    print("tried", flush=True)
    raise UserError("the key is wrong: correct it")
sys.exit(cli.run(fail))
"""
WAIT = """
import sys, time
sys.stdout.write("ready\\n")
sys.stdout.flush()
time.sleep(300)
"""


@pytest.fixture
def launch(tmp_path):
    """A function that returns the command to launch a script on two ranks."""

    def launch(script: str, *options: str) -> list[str]:
        path = tmp_path / "script.py"
        path.write_text(script)
        words = [sys.executable, "-m", "megalard.launcher", *options]
        return [*words, "--nproc-per-node", "2", str(path)]

    return launch


def _launch_here(words: list[str], output: Path, errors: Path) -> None:
    """Be the launcher, in a forked process that has imported torch."""
    from megalard.launcher import main

    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ["PYTHONPATH"] = str(CHECKOUT)
    sys.exit(main(words))


@pytest.fixture
def launched(launch, tmp_path):
    """A function that launches a script in the same way and returns its status and its output."""

    def launched(script: str, *options: str) -> subprocess.CompletedProcess:
        words, files = launch(script, *options)[3:], (tmp_path / "output", tmp_path / "errors")
        launcher = SERVER.Process(target=_launch_here, args=(words, *files))
        launcher.start()
        try:
            launcher.join(LIMIT_S)
        finally:
            kill([launcher])
        output, errors = (path.read_text() for path in files)
        return subprocess.CompletedProcess(words, launcher.exitcode, output, errors)

    return launched


def test_ranks_of_one_node_find_each_other_without_the_network(launch, tmp_path):
    """No process listens where another machine can connect."""
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'end')!r}).exists():"
    script = JOIN.replace("END", f"{wait} time.sleep(0.01)")
    # Set by launch/train.sh. Otherwise torchrun starts a store, which listens, for its ranks.
    settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": settings}
    with started(launch(script), **options) as launcher:
        assert [launcher.stdout.readline() for _ in range(2)] == ["sum 2\n"] * 2
        inodes = set()
        for pid in descendants(launcher.pid):
            inodes |= sockets_of(pid)
        assert not inodes & listening_beyond_loopback()
        (tmp_path / "end").touch()
        assert launcher.communicate(timeout=LIMIT_S) == ("", "")
        assert launcher.returncode == 0


def sockets_of(pid: int) -> set[str]:
    """Return the numbers of the sockets of a process."""
    numbers = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        numbers |= set(re.findall(r"socket:\[(\d+)\]", target))
    return numbers


def listening_beyond_loopback() -> set[str]:
    """Return the sockets that accept connections from other machines."""
    numbers = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as file:
            for line in list(file)[1:]:
                fields = line.split()
                address = fields[1].partition(":")[0]
                is_loopback = address.endswith("7F") or address == "0" * 24 + "01000000"
                if fields[3] == "0A" and not is_loopback:
                    numbers.add(fields[9])
    return numbers


def test_the_reason_of_a_failure_is_printed_last_and_bad_input_is_not_tried_again(launched):
    done = launched(BAD_INPUT, "--max-restarts", "3")
    assert done.returncode == 1
    sentence = "megalard: error: the key is wrong: correct it"
    assert done.stderr.splitlines()[-1] == sentence
    assert done.stderr.count(sentence) == 1, "rank 0 leaves it to the launcher"
    assert "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr
    # A rank may end before it prints, because the other has failed; three restarts print more.
    assert 1 <= done.stdout.count("tried") <= 2


def test_a_rank_that_crashes_is_tried_again(launched, tmp_path):
    script = f"""
import os, sys
start, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
if start == "0":
    sys.exit(7)
open({str(tmp_path / "tries")!r}, "a").write(rank)
"""
    done = launched(script, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "tries").read_text()) == ["0", "1"]


def test_the_status_is_that_of_the_rank(launched):
    done = launched("import sys\nsys.exit(7)\n")
    assert done.returncode == 7
    last = done.stderr.splitlines()[-1]
    assert "torch/distributed" not in done.stderr, "torchrun's messages are printed if asked"
    assert re.fullmatch(
        r"megalard: error: rank \d \(process \d+\) ended with status 7; its own messages are above",
        last,
    )


@pytest.mark.parametrize(("exitcode", "status"), [(7, 7), (-9, 137), (-15, 143)])
def test_a_rank_that_a_signal_ended_gives_the_status_of_a_shell(exitcode, status, capsys):
    """The message names the rank that failed first, not the lowest rank."""
    failures = {
        rank: SimpleNamespace(
            exitcode=code, pid=rank + 100, timestamp=time, error_file="/none", signal_name=name
        )
        for rank, code, time, name in (
            (0, -15, 20, lambda: "SIGTERM"),
            (1, exitcode, 10, lambda: f"signal {-exitcode}"),
        )
    }
    assert _report(failures) == status
    how = "ended with status 7" if exitcode > 0 else f"was ended by signal {-exitcode}"
    assert capsys.readouterr().err == (
        f"megalard: error: rank 1 (process 101) {how}; its own messages are above\n"
    )


def test_torchrun_s_messages_are_printed_if_asked(launched):
    done = launched("import sys\nsys.exit(7)\n", "--verbose")
    assert done.returncode == 7 and "exitcode  : 7" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_ranks_end_with_the_launcher(number, launch):
    # torchrun ends its ranks after a SIGTERM. When it is killed, they end by themselves.
    join = "from megalard.parallel.mesh import build_mesh\nbuild_mesh('cpu', 2)\n"
    script = (join if number == signal.SIGKILL else "") + WAIT
    with started(launch(script), stdout=subprocess.PIPE, text=True) as launcher:
        for _ in range(2):
            assert launcher.stdout.readline() == "ready\n"
        ranks = descendants(launcher.pid)[1:]
        assert len(ranks) >= 2
        launcher.send_signal(number)
        status = launcher.wait(60)
        assert status == (128 + number if number == signal.SIGTERM else -number)
        wait_until(lambda: not any(map(is_running, ranks)), 60)
