"""The file of results, and what it chooses."""

from __future__ import annotations

import json

import pytest

from tests.command_line import user_error
from tools.study.results import RESULTS, best_rate, read_results, reported, validation_loss


def result(kind: str, method: str, rate: float, rope: str = "linear", loss: float = 1.0) -> dict:
    validation = {"python": {"512": {"loss": loss}}}
    return dict(kind=kind, method=method, rope=rope, rate=rate, validation=validation)


SEARCHES = [
    result("search", "cpt", 0.1, loss=2.0),
    result("search", "cpt", 0.2, loss=1.0),
    result("search", "cpt", 0.3, loss=float("nan")),
    result("search", "cpt", 0.1, "yarn", loss=1.0),
]


def test_the_best_rate_has_the_lowest_validation_loss_of_its_rope():
    assert best_rate(SEARCHES, "cpt", "linear") == 0.2
    assert best_rate(SEARCHES, "cpt", "yarn") == 0.1
    assert best_rate(SEARCHES[:3], "cpt", "yarn") == 0.2, "it takes the choice of another RoPE"
    sentence = user_error(best_rate, SEARCHES, "longred", "linear")
    assert "no learning rate of longred was tried" in sentence


def test_a_diverged_run_counts_as_the_worst():
    assert validation_loss(SEARCHES[2]) == float("inf")
    assert validation_loss(SEARCHES[0]) == pytest.approx(2.0)


def test_a_report_is_about_each_method_at_its_best_rate():
    kept = [
        result("final", "cpt", 0.2),
        result("final", "cpt", 0.1, "yarn"),
        result("timing", "cpt", 0.2),
        result("baseline", "teacher", 0.0),
    ]
    others = [
        result("final", "cpt", 0.1),
        result("final", "cpt", 0.2, "yarn"),
        result("final", "an earlier recipe", 0.1),
        result("timing", "an earlier recipe", 0.1),
    ]
    assert reported([*SEARCHES, *others, *kept]) == [*SEARCHES, *kept]


def test_results_of_earlier_versions_are_read(tmp_path):
    assert read_results(tmp_path) == []
    line = {"key": "a", "tokens_a_step": 4096, "seconds_a_step": 0.5}
    (tmp_path / RESULTS).write_text(json.dumps(line) + "\n" + json.dumps({"key": "b"}) + "\n")
    old, new = read_results(tmp_path)
    assert old == {"key": "a", "tokens_per_step": 4096, "seconds_per_step": 0.5}
    assert new == {"key": "b"}
