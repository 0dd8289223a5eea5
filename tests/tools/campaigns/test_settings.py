"""A share of the generated configurations: each is read or refused in one sentence."""

from __future__ import annotations

import dataclasses
import random

import pytest

from megalard.config.schema import Config
from megalard.errors import UserError
from tests.command_line import tool
from tools.campaigns import settings
from tools.campaigns.tally import Tally

campaign = tool("campaigns.settings")


class Sentence(UserError):
    """An error whose text is not made one line."""

    def __str__(self) -> str:
        return str(self.args[0])

    def __init__(self, text: str):
        super().__init__("short")
        self.args = (text,)


def test_configurations_are_read_or_refused(capsys):
    assert campaign("--count", 400, "--seed", 10**6) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert total.strip() == "400 cases, of which 0 are not as they should be"
    counts = dict(reversed(line.split()) for line in lines)
    assert int(counts["read"]) > 20 and int(counts["refused"]) > 200
    assert sum(map(int, counts.values())) == 400


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("broken"), "traceback"),
        (Sentence("one\ntwo"), "sentence of several lines"),
        (Sentence("word " * 500), "sentence of several lines"),
    ],
)
def test_what_is_neither_is_found(error, kind, monkeypatch, capsys):
    def fail(path, overrides):
        raise error

    monkeypatch.setattr(settings, "load_config", fail)
    assert campaign("--count", 1) == 1
    assert f"{kind}: seed 0" in capsys.readouterr().out


def test_a_slow_answer_is_found(monkeypatch, capsys):
    times = iter((0.0, 2.0))
    monkeypatch.setattr(settings.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(settings, "load_config", lambda path, overrides: None)
    assert campaign("--count", 1) == 1
    assert "slow: seed 0" in capsys.readouterr().out


def test_every_key_is_drawn(tmp_path):
    keys = settings.keys_of(Config)
    assert {"optimizer.betas", "trainable.lora.rank", "objective.relations.q"} <= set(keys)
    sections = {field.name for field in dataclasses.fields(Config)}
    assert {key.partition(".")[0] for key in keys} == sections
    drawn = " ".join(
        " ".join(settings.draw(random.Random(seed), tmp_path)[1]) for seed in range(2000)
    )
    assert [key for key in keys if f"--{key}" not in drawn] == []


def test_a_tally_prints_what_is_bad_and_counts_all(capsys):
    tally = Tally()
    tally.add("read", True, "case 1")
    tally.add("slow", False, "case 2", "took\ntwo seconds")
    assert tally.report() == 1 and Tally().report() == 0
    *lines, total, empty_total = capsys.readouterr().out.splitlines()
    assert lines == [r"slow: case 2: took\ntwo seconds", "       1 read", "       1 slow"]
    assert total == "       2 cases, of which 1 are not as they should be"
    assert empty_total == "       0 cases, of which 0 are not as they should be"
