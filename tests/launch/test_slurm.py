"""The job script for Slurm, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import re
import signal
from contextlib import redirect_stdout
from pathlib import Path

from tests.jobs import train
from tests.launch.nodes import ENDLESS, SLURM, run_settings, words_of
from tests.ranks import exit_codes, started_ranks, wait_until


def fake_slurm(folder: Path) -> Path:
    """Write the commands that a job script calls: one node, signals passed on, requeues noted."""
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


def train_into(log: str, command: list[str]) -> None:
    """Train, with the output at the end of a file."""
    with open(log, "a") as file, redirect_stdout(file):
        train(command)


def test_a_slurm_job_out_of_time_saves_and_queues_itself_again(job, start):
    """The same settings then resume the run, here in a process that nothing launches."""
    output, log, folder = job / "slurm", job / "slurm.log", fake_slurm(job / "slurm-bin")
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_SUBMIT_DIR": str(job),
    }
    words = words_of(job, output, "--gpus", "1", settings=ENDLESS)
    # Slurm runs a copy of the script.
    copy = job / "slurm_script"
    copy.write_text(SLURM.read_text())
    node = start(words, log, copy, **environment)
    node.wait_for("step 3/20000")
    node.process.send_signal(signal.SIGUSR1)
    node.succeed()
    (saved,) = re.findall(r"SIGUSR1: saved after step (\d+)", log.read_text())
    assert (folder / "requeued").read_text() == "7\n"

    with started_ranks(1, train_into, str(log), run_settings(job, output, *ENDLESS)) as ranks:
        wait_until(lambda: f"step {int(saved) + 3}/20000" in log.read_text())
        os.kill(ranks[0].pid, signal.SIGTERM)
        assert exit_codes(ranks) == [0]
    printed = log.read_text()
    assert f"after step {saved}\n" in printed and "Traceback" not in printed
    assert "SIGTERM: saved after step" in printed
