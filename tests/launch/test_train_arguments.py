"""launch/train.sh hands every option to torchrun or to the trainer: PYTHON prints its arguments."""

from __future__ import annotations

import os
import re

import pytest

from megalard.config.file import load_config
from tests.processes import CHECKOUT, finished

SCRIPT = CHECKOUT / "launch" / "train.sh"
# environment.sh asks for the version and the requirements, and train.sh for the number of GPUs.
PYTHON = """#!/bin/bash
case "$*" in
    *megalard.launcher*) printf '%s\\n' "$@"; env >"$0.env" ;;
    *device_count*) echo 8 ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts the script, and returns the words for torchrun and the trainer."""
    for name in ("model", "text's"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.yaml").touch()
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*words: str, required: bool = True) -> tuple[list[str], list[str]]:
        given = ["--model", "model", "--data", "text's", "--output", "out"] if required else []
        environment = {"PYTHON": str(python), "OMP_NUM_THREADS": ""}
        done = finished(["bash", SCRIPT, *given, *words], cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        trainer = lines.index("megalard.train")
        assert lines[:2] == ["-m", "megalard.launcher"] and lines[trainer - 1] == "-m"
        return lines[2 : trainer - 1], lines[trainer + 1 :]

    return run


def value(words: list[str], option: str) -> str | None:
    """Return what follows an option, which may be given once."""
    assert words.count(option) <= 1
    return words[words.index(option) + 1] if option in words else None


# What an option adds to the words of torchrun, and to those of the trainer.
OPTIONS = {
    "--config": (("--config", "config.yaml"), {}, {"--config": "config.yaml"}),
    "--tp": (("--tp", "4"), {}, {"--parallel.tp": "4"}),
    "--cp": (("--cp", "2"), {}, {"--parallel.cp": "2"}),
    "--gpus": (("--gpus", "3"), {"--nproc-per-node": "3"}, {}),
    "--max-restarts": (("--max-restarts", "5"), {"--max-restarts": "5"}, {}),
    "--nodes": (
        ("--nodes", "2", "--rendezvous", "host:29400"),
        {"--nnodes": "2", "--rdzv-backend": "c10d", "--rdzv-id": "megalard"},
        {},
    ),
    "--rendezvous": (
        ("--nodes", "2", "--rendezvous", "host:29400"),
        {"--rdzv-endpoint": "host:29400", "--rdzv-conf": "read_timeout=300"},
        {},
    ),
    "--node-rank": (
        ("--nodes", "2", "--rendezvous", "host:29400", "--node-rank", "1"),
        {"--node-rank": "1", "--master-addr": "host", "--master-port": "29400"},
        {},
    ),
    "--address": (
        ("--nodes", "2", "--rendezvous", "host:29400", "--address", "here"),
        {"--local-addr": "here"},
        {},
    ),
    "--id": (
        ("--nodes", "2", "--rendezvous", "host:29400", "--id", "night"),
        {"--rdzv-id": "night"},
        {},
    ),
}
# Options with a test of their own below.
OTHERS = {"--model", "--data", "--output", "--preflight", "--verbose", "--help"}


def test_every_option_has_a_row():
    text = SCRIPT.read_text()
    in_cases = set(re.findall(r"(--[a-z][a-z-]+)(?= \||\))", text))
    in_help = set(re.findall(r"^#   (--[a-z-]+)", text, re.MULTILINE))
    assert in_cases - {"--help"} == in_help == (set(OPTIONS) | OTHERS) - {"--help"}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_reaches_torchrun_or_the_trainer(option, start):
    words, for_torchrun, for_trainer = OPTIONS[option]
    torchrun, trainer = start(*words)
    plain = start()
    for found, expected, without in (
        (torchrun, for_torchrun, plain[0]),
        (trainer, for_trainer, plain[1]),
    ):
        assert {name: value(found, name) for name in expected} == expected
        # Nothing else changes, except what several nodes bring with them.
        if "--nodes" not in words:
            rest = {w for w in found if w.startswith("--")} - set(expected)
            assert rest == {w for w in without if w.startswith("--")} - set(expected)
        assert {name: value(without, name) for name in expected} != expected or not expected


def test_the_words_without_options(start):
    """Eight GPUs are found, and nothing is asked of the trainer but what is required."""
    torchrun, trainer = start()
    assert torchrun == ["--nproc-per-node", "8", "--max-restarts", "0"]
    assert [word for word in trainer if word.startswith("--")] == [
        "--model.teacher",
        "--data.paths",
        "--run.output",
    ]


@pytest.mark.parametrize("form", ["two words", "an equals sign"])
def test_model_text_and_output_are_named_exactly(form, start):
    given = {"--model": "model", "--data": "text's", "--output": "o ut"}
    words = [word for pair in given.items() for word in pair]
    if form == "an equals sign":
        words = [f"{key}={text}" for key, text in given.items()]
    _, trainer = start(*words, required=False)
    config = load_config(None, trainer)
    assert config.model.teacher == "model" and config.run.output == "o ut"
    assert config.data.paths == ["text's"]


def test_several_paths_are_a_list(start):
    _, trainer = start("--model=model", "--data=text's,model", "--output=o", required=False)
    assert load_config(None, trainer).data.paths == ["text's", "model"]


def test_preflight_goes_to_the_trainer(start):
    torchrun, trainer = start("--preflight")
    assert "--preflight" in trainer and "--preflight" not in torchrun


def test_verbose_is_the_launcher_s_first_word(start):
    torchrun, trainer = start("--verbose")
    assert torchrun[0] == "--verbose" and "--verbose" not in trainer


def test_what_follows_two_dashes_goes_to_the_trainer_as_it_is(start):
    rest = ["--optimizer.steps", "5", "--streams", "{a: {weight: 2}}", "--tp"]
    _, trainer = start("--tp", "2", "--", *rest)
    assert trainer[-len(rest) :] == rest and value(trainer, "--parallel.tp") == "2"


def test_a_rank_has_its_share_of_the_cores(start, tmp_path):
    start("--gpus", "1")
    one = (tmp_path / "python.env").read_text()
    start("--gpus", "4000")
    many = (tmp_path / "python.env").read_text()
    cores = os.sysconf("SC_NPROCESSORS_ONLN")
    assert re.search(rf"^OMP_NUM_THREADS={cores}$", one, re.MULTILINE)
    assert re.search(r"^OMP_NUM_THREADS=1$", many, re.MULTILINE)
    assert re.search(r"^TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1$", one, re.MULTILINE)


@pytest.mark.parametrize(("flags", "status"), [((), 0), (("--preflight",), 143)])
def test_a_preflight_that_is_stopped_has_not_passed(flags, status, start, tmp_path):
    """The signal comes while the script counts the GPUs, when a run has nothing to save yet."""
    (tmp_path / "python").write_text(PYTHON.replace("echo 8", "kill -TERM $PPID; echo 8"))
    given = ("--model=model", "--data=model", "--output=out", *flags)
    environment = {"PYTHON": str(tmp_path / "python")}
    done = finished(["bash", SCRIPT, *given], cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (status, "SIGTERM: stopped; nothing to save\n")


def test_the_ranks_of_all_nodes_share_one_model(start):
    """Two nodes with eight GPUs each have 16 ranks."""
    torchrun, trainer = start("--nodes=2", "--rendezvous=host:29400", "--tp=16")
    assert value(torchrun, "--nproc-per-node") == "8" and value(torchrun, "--nnodes") == "2"
    assert value(trainer, "--parallel.tp") == "16"


def test_the_port_of_a_rendezvous_is_what_follows_the_last_colon(start):
    """The host may be an IPv6 address."""
    torchrun, _ = start("--nodes=2", "--rendezvous=fd00::5:29400", "--node-rank=1")
    assert value(torchrun, "--master-addr") == "fd00::5"
    assert value(torchrun, "--master-port") == "29400"


def test_the_first_node_hosts_the_rendezvous(start):
    """With restarts the ranks of nodes may change, so that torchrun's rendezvous is used."""
    several = ("--nodes", "2", "--rendezvous", "host:29400", "--max-restarts", "1")
    for rank, is_host in (("0", "true"), ("1", "false")):
        torchrun, _ = start(*several, "--node-rank", rank)
        assert value(torchrun, "--rdzv-conf") == f"read_timeout=300,is_host={is_host}"
        assert value(torchrun, "--node-rank") is None
