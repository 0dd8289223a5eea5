"""A campaign gives each seed to one process, is bounded, and survives the end of its processes."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from tools.campaigns import workers
from tools.campaigns.campaign import Campaign
from tools.campaigns.tally import Outcome


def drawn(seed, material, scratch, options):
    assert list(scratch.iterdir()) == []
    (scratch / "left").touch()
    yield Outcome(random.Random(seed).choice("ab"), True, str(os.getpid()), is_shown=True)


def run(capsys, try_case, *words, status=0, **more):
    campaign = Campaign("Try.", 7, try_case, **more)
    assert campaign.main([str(word) for word in words]) == status
    return capsys.readouterr()


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_seed_is_tried_once_with_the_same_outcome(jobs, capsys):
    printed = run(capsys, drawn, "--jobs", jobs, "--seed", 5, "--count", 20).out.splitlines()
    shown = [line.split(": ") for line in printed if ": seed " in line]
    expected = sorted((random.Random(seed).choice("ab"), f"seed {seed}") for seed in range(5, 25))
    assert sorted((kind, seed) for kind, seed, _, _ in shown) == expected
    processes = {process for _, _, process, _ in shown}
    assert str(os.getpid()) not in processes and len(processes) == jobs
    assert printed[-1] == "      20 cases, of which 0 are not as they should be"


def test_material_is_made_once_and_each_process_begins(capsys, tmp_path):
    def prepare(folder, options):
        (tmp_path / "prepared").mkdir()
        return "material"

    def begin():
        (tmp_path / f"begun-{os.getpid()}").touch()

    def attempt(seed, material, scratch, options):
        yield Outcome(material, True, "")

    printed = run(capsys, attempt, "--jobs", 2, prepare=prepare, begin=begin)
    assert "       7 material" in printed.out
    assert len(list(tmp_path.glob("begun-*"))) == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_process_that_ends_is_an_outcome_and_is_replaced(jobs, capsys):
    def attempt(seed, material, scratch, options):
        if seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == 3:
            os._exit(7)
        yield Outcome("done", True, "")

    printed = run(capsys, attempt, "--jobs", jobs, status=1).out
    assert "ended: seed 1: : the process ended: SIGKILL\n" in printed
    assert "ended: seed 3: : the process ended: status 7\n" in printed
    assert "       5 done" in printed and "       2 ended" in printed


def test_a_case_without_end_is_an_outcome(capsys, monkeypatch):
    monkeypatch.setattr(workers, "CASE_LIMIT_S", 0.5)
    monkeypatch.setattr(workers, "_PROGRESS_S", 0.1)

    def attempt(seed, material, scratch, options):
        if seed == 2:
            time.sleep(600)
        yield Outcome("done", True, "")

    printed = run(capsys, attempt, "--jobs", 2, status=1)
    assert "hang: seed 2: : it took more than 0 s" in printed.out
    assert "       6 done" in printed.out


def test_no_case_is_begun_after_the_time(capsys, monkeypatch):
    monkeypatch.setattr(workers, "_PROGRESS_S", 0.05)

    def attempt(seed, material, scratch, options):
        time.sleep(0.3)
        yield Outcome("done", True, "")

    printed = run(capsys, attempt, "--jobs", 2, "--count", 1000, "--minutes", 0.01)
    assert "stopped before seed " in printed.out and ", after 0.01 minutes" in printed.out
    assert " cases in 0 s, 0 bad" in printed.err
    seeds = int(printed.out.partition("stopped before seed ")[2].partition(",")[0])
    assert f"{seeds:8d} cases, of which 0" in printed.out and 0 < seeds < 100


def test_the_counts_are_written_to_a_file(capsys, tmp_path):
    run(capsys, drawn, "--json", tmp_path / "t.json", "--seed", 3)
    written = json.loads((tmp_path / "t.json").read_text())
    assert sum(written["outcomes"].values()) == 7
    assert (written["seed"], written["bad"]) == (3, [])
    printed = run(capsys, drawn, "--json", tmp_path / "no" / "t.json", status=1)
    assert printed.err.splitlines()[-1].startswith("megalard: error: cannot write ")


def test_every_campaign_has_the_same_arguments(capsys):
    with pytest.raises(SystemExit):
        run(capsys, drawn, "--help")
    printed = capsys.readouterr().out
    assert "cases (7)" in printed and "--jobs" in printed and "--minutes" in printed
    with pytest.raises(SystemExit):
        run(capsys, drawn, "--jobs", 0)
    assert "--jobs 0: give at least 1" in capsys.readouterr().err
