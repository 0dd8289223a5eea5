"""A campaign is bounded, lists what is bad on one line each, and has a status."""

from __future__ import annotations

import argparse
import time

import pytest

from tools.campaigns.tally import Tally, main_of, numbers


def options(**values) -> argparse.Namespace:
    return argparse.Namespace(**{"seed": 0, "count": 3, "minutes": 0.0, **values})


def test_what_is_bad_is_listed_on_one_line_and_gives_status_1(capsys):
    tally = Tally()
    tally.add("refused", True, "seed 1", "a sentence")
    tally.add("refused", True, "seed 2", "a sentence")
    assert tally.report() == 0
    tally.add("traceback", False, "seed 3: a\nb", "x\x1b[31m")
    capsys.readouterr()
    assert tally.report() == 1
    assert capsys.readouterr().out == (
        "       2 refused\n       1 traceback\n"
        "       3 cases, of which 1 are not as they should be\n"
    )
    tally.add("hang", False, "seed 4: a\nb", "x\x1b[31m")
    assert capsys.readouterr().out == "hang: seed 4: a\\nb: x\\x1b[31m\n"


def test_cases_are_bounded_in_number_and_in_time(capsys, monkeypatch):
    assert list(numbers(options(seed=5), Tally())) == [5, 6, 7]
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    seen = []
    for number in numbers(options(count=100, minutes=1.0), Tally()):
        seen.append(number)
        now[0] += 25
    assert seen == [0, 1, 2]
    printed = capsys.readouterr()
    assert printed.out == "stopped before seed 3, after 1 minutes\n"
    assert printed.err.splitlines()[0] == "1 cases in 25 s, 0 bad"


def test_every_campaign_has_the_same_arguments(capsys):
    def run(options: argparse.Namespace) -> int:
        return options.seed * 100 + options.count * 10 + int(options.minutes)

    assert main_of("Try.", run, 7, []) == 70
    assert main_of("Try.", run, 7, ["--seed", "1", "--count", "2", "--minutes", "3"]) == 123
    with pytest.raises(SystemExit):
        main_of("Try.", run, 7, ["--help"])
    assert "cases (7)" in capsys.readouterr().out
