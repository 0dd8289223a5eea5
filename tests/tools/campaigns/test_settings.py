"""A share of the generated configurations: each is read or refused in one sentence."""

from __future__ import annotations

import dataclasses
import random

import pytest

from megalard.config.schema import Config
from megalard.errors import UserError
from tests.command_line import tool
from tools.campaigns import settings

campaign = tool("campaigns.settings")


class Sentence(UserError):
    """An error whose text is not made one line."""

    def __str__(self) -> str:
        return str(self.args[0])

    def __init__(self, text: str):
        super().__init__("short")
        self.args = (text,)


def test_configurations_are_read_or_refused(capsys):
    assert campaign("--count", 200, "--seed", 10**6) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = dict(reversed(words) for words in lines if len(words) == 2)
    assert int(counts["read"]) > 10 and int(counts["refused"]) > 100
    assert sum(map(int, counts.values())) == 200


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
    monkeypatch.setattr(settings.time, "process_time", lambda: next(times))
    monkeypatch.setattr(settings, "load_config", lambda path, overrides: None)
    assert campaign("--count", 1) == 1
    assert "slow: seed 0" in capsys.readouterr().out


def test_every_key_is_drawn(tmp_path):
    keys = settings.keys_of(Config)
    assert {"optimizer.betas", "trainable.lora.rank", "objective.relations.q"} <= set(keys)
    sections = {field.name for field in dataclasses.fields(Config)}
    assert {key.partition(".")[0] for key in keys} == sections
    missing = set(keys)
    for seed in range(2000):
        words = " ".join(settings.draw(random.Random(seed), tmp_path)[1])
        missing -= {key for key in missing if f"--{key}" in words}
        if not missing:
            break
    assert missing == set()
