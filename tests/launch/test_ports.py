"""The ports of a run on one node cannot be reached from another machine.

The other machine is a network namespace.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import make_job
from tests.launch.namespaces import two_namespaces
from tests.launch.nodes import stand_in, words_of
from tests.processes import descendants, started

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


# What connects the ranks of a trainer: two axes of one rank each, and one of all.
RANK = """
import os, time
import torch
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import build_mesh

mesh = build_mesh("cpu", 2)
for axis in (mesh.world, mesh.data, mesh.tp):
    all_reduce(torch.ones(1), axis)
open(os.path.join(os.environ["STAND_IN_FOLDER"], os.environ["RANK"]), "w").close()
time.sleep(600)
"""


def test_no_port_of_a_run_on_one_node_is_reached(network, tmp_path, start):
    words = words_of(make_job(tmp_path), tmp_path / "output", "--gpus", "2")
    environment = stand_in(tmp_path, RANK)
    node = start(words, tmp_path / "log", before=network.inside(0), **environment)
    for rank in ("0", "1"):
        node.wait((tmp_path / rank).exists)
    ports = listening_ports(node.ranks()[0])
    # The ranks listen to each other, on the loopback device.
    assert len(node.ranks()) == 2 and ports, "nothing listens at all"
    assert reached_from_the_other(network, ports) == set()
