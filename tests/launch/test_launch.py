"""The launch scripts: torchrun on one node and on two, lost nodes, signals, Slurm, bad arguments.

A node is one start of train.sh, whose processes are killed together as a machine's would be. Where
network namespaces can be made the node that is lost has one of its own, and its cable is pulled
first, so that the other is not told; elsewhere the two talk over the loopback device.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import arguments, make_job, metrics
from tests.launch.namespaces import Network, two_namespaces
from tests.ranks import free_port

LAUNCH = Path(__file__).parents[2] / "launch"
TRAIN, SLURM = LAUNCH / "train.sh", LAUNCH / "slurm.sbatch"
# the limit is for what hangs: among other tests on two busy cores a start has taken a minute
STEPS, LIMIT_S = 60, 300
ENDLESS = ("optimizer.steps=20000", "checkpoint.save_every=0")
GIVEN = ("--model.teacher=", "--data.paths=", "--run.output=")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("it's a job"))


@pytest.fixture(scope="module", autouse=True)
def stopped_at_the_end():
    yield
    for node in NODES:
        kill(node)


NODES: list[subprocess.Popen] = []


def command(job: Path, output: Path, *options: str, settings: tuple[str, ...] = ()) -> list[str]:
    """Options of train.sh, and behind -- what it has no option for."""
    own = arguments(job, output, f"optimizer.steps={STEPS}", "checkpoint.save_every=5", *settings)
    rest = [argument for argument in own if not argument.startswith(GIVEN)]
    paths = ["--model", str(job / "model"), "--data", str(job / "train.txt")]
    return [*paths, "--output", str(output), *options, "--", *rest]


def start(
    script: Path, words: list[str], log: Path, before: Sequence[str] = (), **environment: str
) -> subprocess.Popen:
    """Start a script in a folder that is not the checkout, ``before`` being what runs it."""
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    with open(log, "ab") as file:
        node = subprocess.Popen(
            [*before, "bash", str(script), *words],
            cwd=log.parent,
            env={**os.environ, **settings},
            stdout=file,
            stderr=subprocess.STDOUT,
            # A shell that was started in the background ignores SIGINT, and so do its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    NODES.append(node)
    return node


def run(words: list[str], folder: Path, script: Path = TRAIN) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(script), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def finish(node: subprocess.Popen, log: Path) -> None:
    status = node.wait(LIMIT_S)
    assert status == 0, log.read_text()[-4000:]


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for t in threads for c in (t / "children").read_text().split()]
    except OSError:
        children = []
    return [pid] + [member for child in children for member in family(child)]


def kill(node: subprocess.Popen) -> None:
    """What the loss of a node is to the others: everything on it is gone at once."""
    if node.poll() is None:
        for pid in family(node.pid):
            os.kill(pid, signal.SIGKILL)
        node.wait()


def wait_for(condition, node: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert node.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def has(path: Path, pattern: str):
    return lambda: path.exists() and re.search(pattern, path.read_text())


def start_nodes(job: Path, output: Path, logs: list[Path], network: Network, *options: str) -> list:
    """Two nodes of one rank each: as a function of the node's number, and both started."""
    rendezvous = f"{network.addresses[0]}:{free_port()}"
    common = ["--nodes", "2", "--gpus", "1", "--rendezvous", rendezvous, *options]

    def node(number: int) -> subprocess.Popen:
        own = ["--address", network.addresses[number], "--node-rank", str(number)]
        words = command(job, output, *common, *own)
        return start(TRAIN, words, logs[number], network.inside(number), **network.environment())

    return [node, node(0), node(1)]


@pytest.fixture(scope="module")
def one(job):
    """The run by one node of two ranks."""
    output = job / "one"
    done = run(command(job, output, "--gpus", "2"), job)
    assert done.returncode == 0, done.stderr
    return output


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The sums over two ranks have one order, so not a bit may differ."""
    first, second = metrics(ours), metrics(theirs)
    assert [line["step"] for line in first] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    a, b = (load_file(output / "student" / "model.safetensors") for output in (ours, theirs))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=["namespaces", "loopback"])
def network(request):
    """One of the two is skipped: namespaces show all that the loopback device does."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(two_namespaces())
        except PermissionError as error:
            if request.param == "namespaces":
                pytest.skip(f"no two network namespaces here: {error}")
            found = Network()
        else:
            if request.param == "loopback":
                pytest.skip("the same is tested in network namespaces")
        yield found


def test_two_nodes_are_one_of_two_ranks_though_one_is_lost_and_starts_again(job, one, network):
    """The run goes on from the last checkpoint, and to the same end."""
    output, logs = job / "lost", [job / "lost-0.log", job / "lost-1.log"]
    start_node, first, second = start_nodes(job, output, logs, network, "--max-restarts", "1")
    wait_for(has(output / "metrics.jsonl", r'"step": 12,'), first, logs[0])
    network.cable("down")
    kill(second)
    network.cable("up")
    told = len(metrics_so_far(output))
    assert told < STEPS, "the run was over before the node was lost"
    second = start_node(1)
    for node, log in zip((first, second), logs, strict=True):
        finish(node, log)
    # whichever of them has rank 0 now says so
    printed = "".join(log.read_text() for log in logs)
    (resumed,) = re.findall(r"resuming from .* after step (\d+)", printed)
    assert 5 <= int(resumed) <= told
    assert_same_run(output, one)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def ranks_of(node: subprocess.Popen) -> list[int]:
    """The trainers among a node's processes, in the order of their ranks."""
    found = {}
    for pid in family(node.pid):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {word: pid for word in words if word.startswith(b"RANK=")}
    return [found[word] for word in sorted(found)]


@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_start_again_when_one_is_killed(killed, job, one):
    """The one that starts last is waited for, not looked for where it was before."""
    output, log, late = job / f"again-{killed}", job / f"again-{killed}.log", job / f"late-{killed}"
    late.mkdir()
    # torchrun's own child of this rank, which Python runs before anything else
    (late / "sitecustomize.py").write_text(f"""
import os, time
if (os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")) == ("{killed}", "1"):
    time.sleep(6)
""")
    words = command(job, output, "--gpus", "2", "--max-restarts", "1")
    node = start(TRAIN, words, log, PYTHONPATH=str(late))
    wait_for(has(output / "metrics.jsonl", r'"step": 12,'), node, log)
    os.kill(ranks_of(node)[killed], signal.SIGKILL)
    finish(node, log)
    assert "resuming from" in log.read_text()
    assert_same_run(output, one)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_signal_to_a_run_that_has_just_failed(restarts, job):
    """It stops ranks that start again, and does not hide a failure."""
    output, log = job / f"failed-{restarts}", job / f"failed-{restarts}.log"
    options = ("--gpus", "2", "--max-restarts", str(restarts))
    node = start(TRAIN, command(job, output, *options, settings=ENDLESS), log)
    wait_for(has(output / "metrics.jsonl", r'"step": 3,'), node, log)
    os.kill(ranks_of(node)[1], signal.SIGKILL)
    time.sleep(0.1)
    node.send_signal(signal.SIGTERM)
    # The status of a run that a signal ended is 128 + its number.
    assert node.wait(LIMIT_S) == (0 if restarts else 128 + signal.SIGKILL), log.read_text()[-4000:]


def test_ctrl_c_saves_and_a_second_one_ends_at_once(job):
    output, log = job / "ctrl-c", job / "ctrl-c.log"
    words = command(job, output, "--gpus", "2", settings=ENDLESS)
    node = start(TRAIN, words, log)
    wait_for(has(output / "metrics.jsonl", r'"step": 3,'), node, log)
    node.send_signal(signal.SIGINT)
    finish(node, log)
    assert "SIGTERM: saved after step" in log.read_text() and "Traceback" not in log.read_text()
    told = len(metrics_so_far(output))
    node = start(TRAIN, words, log)
    wait_for(lambda: len(metrics_so_far(output)) > told, node, log)
    # a rank that stands still cannot save
    standing, other = ranks_of(node)
    os.kill(standing, signal.SIGSTOP)
    node.send_signal(signal.SIGINT)
    time.sleep(1)
    node.send_signal(signal.SIGINT)
    assert node.wait(LIMIT_S) == 130
    deadline = time.monotonic() + LIMIT_S
    while runs(standing) or runs(other):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_at_any_moment_of_the_start_ends_the_run_with_0(number, job, one):
    """In the script, in torchrun, in ranks that do not listen yet, and before the first step."""
    output, log = job / number.name, job / f"{number.name}.log"
    words = command(job, output, "--gpus", "2", "--max-restarts", "2")
    for moment in (0.3, 1.5, 3, 5):
        node = start(TRAIN, words, log)
        time.sleep(moment)
        node.send_signal(number)
        finish(node, log)
    finish(start(TRAIN, words, log), log)
    printed = log.read_text()
    assert "error" not in printed and "Traceback" not in printed
    assert "nothing to save" in printed
    assert_same_run(output, one)


def metrics_so_far(output: Path) -> list[str]:
    return (output / "metrics.jsonl").read_text().splitlines()


def fake_slurm(folder: Path) -> Path:
    """The commands that a job script calls: one node, signals passed on, and a note of requeues."""
    folder.mkdir()
    programs = {
        "srun": """
            while [[ $1 = -* ]]; do shift; done
            SLURM_NODEID=0 "$@" & task=$!
            trap 'kill -s USR1 $task' USR1
            until wait $task; status=$?; [ $status -lt 128 ]; do :; done
            exit $status
        """,
        "scontrol": f"""
            case $1 in
                show) echo "   Command={SLURM} --model here" ;;
                requeue) echo $2 >>"$(dirname "$0")"/requeued ;;
            esac
        """,
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)
    return folder


def test_a_slurm_job_out_of_time_saves_and_queues_itself_again(job):
    """And the same arguments go on, here outside of Slurm and to a SIGTERM."""
    output, log, folder = job / "slurm", job / "slurm.log", fake_slurm(job / "slurm-bin")
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_SUBMIT_DIR": str(job),
    }
    words = command(job, output, "--gpus", "1", settings=ENDLESS)
    # Slurm runs a copy of the script
    copy = job / "slurm_script"
    copy.write_text(SLURM.read_text())
    node = start(copy, words, log, **environment)
    wait_for(has(log, "step 3/20000"), node, log)
    node.send_signal(signal.SIGUSR1)
    finish(node, log)
    (saved,) = re.findall(r"SIGUSR1: saved after step (\d+)", log.read_text())
    assert (folder / "requeued").read_text() == "7\n"

    node = start(TRAIN, words, log)
    wait_for(has(log, f"step {int(saved) + 3}/20000"), node, log)
    node.terminate()
    finish(node, log)
    assert f"after step {saved}\n" in log.read_text()
    assert "SIGTERM: saved after step" in log.read_text()


@pytest.mark.parametrize("script", [TRAIN, SLURM], ids=lambda path: path.name)
def test_help(script, tmp_path):
    done = run(["--help"], tmp_path, script)
    assert done.returncode == 0 and done.stderr == ""
    for words in ("--model DIR", "--data PATH[,PATH...]", "--output DIR"):
        assert words in done.stdout
    assert "set -euo" not in done.stdout and "#" not in done.stdout


GOOD = ["--model", ".", "--data", ".", "--output", "out", "--gpus", "1"]
BAD = {
    "no model": (["--data", ".", "--output", "out"], "--model is not given"),
    "no data": (["--model", ".", "--output", "out"], "--data is not given"),
    "no output": (["--model", ".", "--data", "."], "--output is not given"),
    "missing model": ([*GOOD, "--model", "nowhere"], "--model nowhere is not a directory"),
    "missing data": ([*GOOD, "--data", ".,nowhere"], "--data nowhere does not exist"),
    "missing config": ([*GOOD, "--config=nowhere.yaml"], "--config nowhere.yaml is not a file"),
    "no value": ([*GOOD, "--tp"], "--tp needs a value"),
    "option for a value": (["--model", "--data", "."], "--model needs a value"),
    "unknown": ([*GOOD, "--modle", "."], "unknown option --modle"),
    "trainer's own": ([*GOOD, "--run.seed", "3"], "the trainer's own settings come after --"),
    "no number": ([*GOOD, "--tp", "two"], "--tp must be 1 or more, not 'two'"),
    "zero": ([*GOOD, "--gpus=0"], "--gpus must be 1 or more, not '0'"),
    "no rendezvous": ([*GOOD, "--nodes", "2"], "--nodes 2 needs --rendezvous HOST:PORT"),
    "no port": ([*GOOD, "--nodes", "2", "--rendezvous", "here"], "must be HOST:PORT, not 'here'"),
    "one node": ([*GOOD, "--node-rank", "1"], "--node-rank and --address need --nodes N"),
    "odd sizes": ([*GOOD, "--tp", "2"], "2, which does not divide the 1 processes"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_are_refused_in_one_line(kind, tmp_path):
    words, sentence = BAD[kind]
    done = run(words, tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.sh: error: ") and sentence in line
    assert not list(tmp_path.iterdir())


def test_the_job_script_is_for_sbatch(tmp_path):
    done = run(GOOD, tmp_path, SLURM)
    assert done.returncode == 2 and "submit this script with sbatch" in done.stderr


SCRIPTS = [
    *LAUNCH.glob("*.sh"),
    SLURM,
    *LAUNCH.parent.glob("tests/*.sh"),
    LAUNCH.parent / ".ci/run",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_bash(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(Path.home()) not in script.read_text()
