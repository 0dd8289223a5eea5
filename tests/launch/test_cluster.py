"""launch/cluster.sh: nodes, ranks and the rendezvous from the variables of schedulers."""

from __future__ import annotations

import subprocess

import pytest

from tests.processes import CHECKOUT

NAMES = ("nodes", "node_rank", "rendezvous", "gpus", "id")
PROBE = (
    'set -euo pipefail; fail() { echo "fail: $*"; exit 2; }; '
    f"source {CHECKOUT}/launch/cluster.sh; "
    + " ".join(f'echo "{name}=${name}";' for name in NAMES)
    + " env | grep ^PET_ || true"
)
KUBEFLOW = {
    "PET_NNODES": "3",
    "PET_NPROC_PER_NODE": "8",
    "PET_NODE_RANK": "2",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29500",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    "SKYPILOT_NUM_GPUS_PER_NODE": "4",
    "SKYPILOT_TASK_ID": "sky-1",
}
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.fixture
def read(tmp_path):
    """A function that returns what the file sets, or the sentence with which it fails."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/bash\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"'
    )
    scontrol.chmod(0o755)

    def read(variables: dict[str, str], **given: str) -> dict[str, str] | str:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **dict.fromkeys(NAMES, ""), **given}
        words = ["bash", "-c", PROBE]
        done = subprocess.run(words, capture_output=True, text=True, env=environment | variables)
        assert done.stderr == ""
        if done.returncode:
            return done.stdout.strip()
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    return read


def expected(nodes: str, rank: str, rendezvous: str, gpus: str, job: str) -> dict[str, str]:
    return dict(zip(NAMES, (nodes, rank, rendezvous, gpus, job), strict=True))


def test_kubeflow(read):
    job = expected("3", "2", "job-node-0-0.job:29500", "8", "megalard")
    # torchrun must not read the variables a second time, so that none of them is left.
    assert read(KUBEFLOW) == job
    assert read(KUBEFLOW | {"PET_NPROC_PER_NODE": "auto"}) == job | {"gpus": ""}
    old = {"PET_RDZV_ENDPOINT": "head:2222", "PET_NNODES": "2", "PET_RDZV_ID": "x"}
    assert read(old) == expected("2", "", "head:2222", "", "x")


def test_one_pod_is_one_node(read):
    alone = read(KUBEFLOW | {"PET_NNODES": "1", "PET_NODE_RANK": "0"})
    assert alone == expected("1", "", "", "8", "megalard")


def test_skypilot(read):
    assert read(SKYPILOT) == expected("2", "1", "10.0.0.4:29400", "4", "sky-1")
    assert read(SKYPILOT | {"SKYPILOT_NUM_NODES": "1"})["rendezvous"] == ""


def test_a_step_of_slurm(read):
    assert read(SLURM) == expected("2", "1", "gpu07:24567", "8", "1234567-0")
    restarted = read(SLURM | {"SLURM_RESTART_COUNT": "3"})
    assert restarted["id"] == "1234567-3"


def test_no_scheduler(read):
    assert read({}) == expected("1", "", "", "", "megalard")
    assert read({"SLURM_JOB_ID": "1", "SLURM_NNODES": "1"}) == read({})


@pytest.mark.parametrize("variables", [KUBEFLOW, SKYPILOT, SLURM])
def test_options_come_first(variables, read):
    given = {"nodes": "2", "node_rank": "0", "rendezvous": "here:1", "gpus": "1", "id": "mine"}
    assert read(variables, **given) == given
    assert read(variables, nodes="1")["rendezvous"] == ""
    assert read({"PET_NNODES": "2"}, nodes="1")["nodes"] == "1"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            KUBEFLOW | {"PET_NNODES": "1:4"},
            "PET_NNODES is '1:4', but the number of nodes has",
        ),
        ({"PET_NNODES": "2"}, "PET_MASTER_ADDR is not set: give --rendezvous HOST:PORT"),
        ({**SLURM, "SLURM_STEP_ID": "4294967290"}, "train.sh was started on one: start it with"),
        ({**SLURM, "SLURM_STEP_NODELIST": "other"}, "scontrol cannot name the nodes of this job"),
        ({**SLURM, "SLURM_STEP_ID": ""}, "has 2 nodes but train.sh was started on one: start it"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "16"}, "srun starts 16 tasks on 2 nodes, but train.sh"),
    ],
)
def test_what_cannot_work_is_refused(variables, sentence, read):
    message = read(variables)
    assert message.startswith("fail: ") and sentence in message
