"""The launch scripts are valid bash, print help, and refuse bad arguments in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.nodes import LAUNCH, SLURM, TRAIN
from tests.processes import finished


def run(words: list[str], folder: Path, script: Path = TRAIN) -> subprocess.CompletedProcess:
    """Run a script to its end in a folder."""
    return finished(["bash", script, *words], cwd=folder, env={"PYTHON": sys.executable})


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
    "odd sizes": ([*GOOD, "--tp", "2"], "2, which does not divide 1, the number of"),
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


@pytest.mark.parametrize(
    ("capabilities", "version"), [("9.0\n9.0", "2.11.*"), ("8.0", "2.13.0"), ("12.0", "2.13.0")]
)
def test_hopper_gets_the_torch_that_its_kernels_have_run_with(capabilities, version, tmp_path):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{capabilities}\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    function = "sed -n '/^torch_version()/,/^}/p' environment.sh"
    command = ["bash", "-c", f'PATH={tmp_path}:$PATH; eval "$({function})"; torch_version']
    done = finished(command, cwd=LAUNCH, env={})
    assert done.stdout.strip() == version
