"""The ports of a run on one node cannot be reached from another machine.

The other machine is a network namespace.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import arguments, make_job, steps_reported
from tests.launch.namespaces import two_namespaces
from tests.processes import CHECKOUT, descendants, started
from tests.ranks import wait_until

# Try to connect to every port that is given; print those that answer.
CONNECT = """
import socket, sys
for port in map(int, sys.argv[2:]):
    with socket.socket() as probe:
        probe.settimeout(2)
        if probe.connect_ex((sys.argv[1], port)) == 0:
            print(port)
"""
LISTEN = """
import socket, time
server = socket.create_server(("0.0.0.0", 0))
print(server.getsockname()[1], flush=True)
time.sleep(300)
"""


@pytest.fixture(scope="module")
def network():
    """Two namespaces."""
    try:
        with two_namespaces() as network:
            yield network
    except PermissionError as error:
        pytest.skip(f"no two network namespaces here: {error}")


def listening_ports(pid: int) -> set[int]:
    """Return all ports on which anything listens in the network namespace of a process."""
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state = line.split()[:4]
            if state == "0A":
                ports.add(int(address.rpartition(":")[2], 16))
    return ports


def reached_from_the_other(network, ports: set[int]) -> set[int]:
    """Return the ports of the first node at which the second node is answered."""
    command = [*network.inside(1), sys.executable, "-c", CONNECT, network.addresses[0]]
    done = subprocess.run(
        [*command, *map(str, sorted(ports))], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(map(int, done.stdout.split()))


def test_a_port_that_is_open_to_all_is_found(network):
    """The test below can fail."""
    command = [*network.inside(0), sys.executable, "-c", LISTEN]
    with started(command, stdout=subprocess.PIPE, text=True) as server:
        port = int(server.stdout.readline())
        pid = descendants(server.pid)[-1]
        assert port in listening_ports(pid)
        assert reached_from_the_other(network, listening_ports(pid)) == {port}


def test_no_port_of_a_run_on_one_node_is_reached(network, tmp_path):
    job, output, log = make_job(tmp_path), tmp_path / "output", tmp_path / "log"
    words = arguments(job, output, "optimizer.steps=20000")
    given = ("--model.teacher=", "--data.paths=", "--run.output=")
    rest = [word for word in words if not word.startswith(given)]
    paths = ("--model", job / "model", "--data", job / "train.txt", "--output", output)
    command = [*network.inside(0), "bash", CHECKOUT / "launch" / "train.sh", *paths]
    with (
        open(log, "wb") as file,
        started(
            [*command, "--gpus", "2", "--", *rest],
            stdout=file,
            stderr=file,
            env={"PYTHON": sys.executable},
        ) as node,
    ):

        def is_training() -> bool:
            assert node.poll() is None, log.read_text()
            return len(steps_reported(output)) > 2

        wait_until(is_training, 300)
        ranks = [pid for pid in descendants(node.pid) if re.search(rb"RANK=", environment(pid))]
        ports = listening_ports(ranks[0])
        # The ranks listen to each other, on the loopback device.
        assert len(ranks) >= 2 and ports, "nothing listens at all"
        assert reached_from_the_other(network, ports) == set()


def environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()
