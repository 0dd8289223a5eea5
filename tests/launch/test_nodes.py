"""Nodes and ranks that are lost: the run goes on from its last checkpoint, to the same end.

A node is one start of train.sh, whose processes are killed together as a machine's would be. Where
network namespaces can be made, the node that is lost has a namespace and its cable is pulled first,
so that the other node is not notified. Elsewhere the two nodes use the loopback device.
"""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import metrics
from tests.launch.namespaces import Network, two_namespaces
from tests.launch.nodes import STEPS, Node, changed_trainer, stand_in, words_of
from tests.processes import kill
from tests.ranks import free_port


def assert_same_run(run: Path, expected: Path) -> None:
    """Compare losses and weights: sums over two ranks have one order, so not a bit may differ."""
    lines, expected_lines = metrics(run), metrics(expected)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected_lines]
    a, b = (load_file(output / "student" / "model.safetensors") for output in (run, expected))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=["namespaces", "loopback"])
def network(request):
    """One of the two is skipped: namespaces show all that the loopback device does."""
    with ExitStack() as stack:
        try:
            network = stack.enter_context(two_namespaces())
        except PermissionError as error:
            if request.param == "namespaces":
                pytest.skip(f"no two network namespaces here: {error}")
            network = Network()
        else:
            if request.param == "loopback":
                pytest.skip("the same is tested in network namespaces")
        yield network


# No rank begins step 8 before a node is lost. The save after step 5 ends meanwhile, or has ended.
WAITS_FOR_THE_LOSS = """
from megalard.training.run import Run

step = Run.step

def wait_and_step(run, stage, number):
    if number == 8:
        (FOLDER / f"waits-{os.environ['RANK']}").touch()
        wait_for(FOLDER / "lost")
    step(run, stage, number)

Run.step = wait_and_step
"""


def test_two_nodes_are_one_of_two_ranks_though_one_is_lost_and_starts_again(
    job, uninterrupted, network, tmp_path, start
):
    environment = network.environment() | changed_trainer(tmp_path, WAITS_FOR_THE_LOSS)
    output, logs = job / "lost", [job / "lost-0.log", job / "lost-1.log"]
    rendezvous = f"{network.addresses[0]}:{free_port()}"
    options = ["--nodes", "2", "--gpus", "1", "--rendezvous", rendezvous, "--max-restarts", "1"]

    def start_node(number: int) -> Node:
        place = ["--address", network.addresses[number], "--node-rank", str(number)]
        words, before = words_of(job, output, *options, *place), network.inside(number)
        return start(words, logs[number], before=before, **environment)

    first, second = start_node(0), start_node(1)
    first.wait((output / "checkpoints" / "step-000005").is_dir)
    for rank in (0, 1):
        first.wait((tmp_path / f"waits-{rank}").exists)
    network.cable("down")
    kill(second.process)
    network.cable("up")
    (tmp_path / "lost").touch()
    second = start_node(1)
    first.succeed()
    second.succeed()
    # The node that has rank 0 after the restart says so.
    printed = "".join(log.read_text() for log in logs)
    (resumed,) = re.findall(r"resuming from .* after step (\d+)", printed)
    assert int(resumed) == 5
    assert_same_run(output, uninterrupted)


# In the first two starts the ranks wait to be killed. In the second and the third start, one rank
# comes a second after the other.
RANK = """
import os, time
from pathlib import Path
import torch
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import build_mesh

start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
folder = Path(os.environ["STAND_IN_FOLDER"])
if (start, rank) in {(1, 0), (2, 1)}:
    while not (folder / f"{start}-{1 - rank}-joins").exists():
        time.sleep(0.02)
    time.sleep(1)
(folder / f"{start}-{rank}-joins").touch()
ranks = all_reduce(torch.ones(1), build_mesh("cpu", 1).world).item()
(folder / f"{start}-{rank}").write_text(f"{ranks:.0f}")
time.sleep(0 if start == 2 else 600)
"""


def test_ranks_find_each_other_again_when_one_is_killed(job, tmp_path, start):
    """The rank that starts last is waited for, and not looked for where it was before."""
    words = words_of(job, tmp_path / "output", "--gpus", "2", "--max-restarts", "2")
    node = start(words, tmp_path / "log", **stand_in(tmp_path, RANK))
    for number, victim in ((0, 0), (1, 1)):
        for rank in (0, 1):
            node.wait_for("2", tmp_path / f"{number}-{rank}")
        os.kill(node.ranks()[victim], signal.SIGKILL)
    node.succeed()
    assert [(tmp_path / f"2-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
