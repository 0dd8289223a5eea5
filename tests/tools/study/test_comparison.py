"""The numbers that methods are compared by, from made-up measurements."""

from __future__ import annotations

import math

import pytest

from tests.tools.study.measured import PYTHON_OFFSET, baselines, final, measured
from tools.study.comparison import IN, OUT, Comparison, Spread


@pytest.fixture
def comparison():
    finals = [final("linearard", 1, [3.0, 2.5, 2.1]), final("linearard", 2, [3.0, 2.5, 2.3])]
    return Comparison([*baselines(), *finals], "python")


def test_domains_are_the_training_domain_and_all_others(comparison):
    assert comparison.domains(IN) == ["python"] and comparison.domains(OUT) == ["c", "prose"]
    assert comparison.short_loss(measured(2.5), OUT) == pytest.approx(2.5)
    assert comparison.short_loss(measured(2.5), IN) == pytest.approx(2.5 + PYTHON_OFFSET)


def test_the_gap_restored_is_a_share_of_the_gap_that_scaling_opened(comparison):
    for where in (IN, OUT):
        assert comparison.restored(measured(4.0), "linear", where) == pytest.approx(0)
        assert comparison.restored(measured(2.0), "linear", where) == pytest.approx(1)
        assert comparison.restored(measured(2.5), "linear", where) == pytest.approx(0.75)


def test_without_a_gap_there_is_no_share():
    comparison = Comparison([*baselines(teacher=3.0, scaled=3.0), final("cpt", 1, [2.0])], "python")
    assert math.isnan(comparison.restored(measured(2.0), "linear", OUT))


def test_numbers_are_given_over_seeds(comparison):
    share = comparison.over_seeds(
        "linearard", "linear", lambda m: comparison.restored(m, "linear", IN)
    )
    assert (share.mean, share.count) == (pytest.approx(0.9), 2)
    assert share.text(2) == "0.90 ± 0.05"
    assert Spread.of([0.5]).text(1) == "0.5" and Spread.of([]).text(1) == "-"


def test_means_over_domains_and_lengths(comparison):
    model = measured(2.1, 0.4)
    model["domains"]["c"]["128"]["kl"] = 0.7
    # Six pairs of a domain and a length outside python, one of which is 0.6 higher.
    assert comparison.short_mean(model, OUT, "kl") == pytest.approx(0.2)
    assert comparison.short_mean(model, OUT, "agreement") == pytest.approx(0.9)
    assert comparison.score_kept(model, OUT) == pytest.approx(0.8)
    model["domains"]["c"]["4096"]["loss"] = 4.1
    assert comparison.long_loss(model, OUT) == pytest.approx(3.1)
    model["domains"]["prose"]["by_position"][-1]["loss"] = 6.1
    assert comparison.far_loss(model, OUT) == pytest.approx(4.1)


def test_a_long_window_has_no_comparison_with_the_teacher(comparison):
    model = measured(2.0)
    model["domains"]["c"]["4096"] |= {"kl": None, "agreement": None}
    entry = comparison.entry(model, OUT)
    assert entry.results.by_length[4096].kl is None
    assert comparison.short_mean(model, OUT, "kl") == pytest.approx(0.1)


def test_exact_answers_are_divided_at_the_native_window(comparison):
    assert comparison.exact(measured(2.1), "passkey", beyond=False) == 1.0
    assert comparison.exact(measured(2.1), "passkey", beyond=True) == pytest.approx(0.375)
    assert math.isnan(comparison.exact(measured(2.1), "multi_key", beyond=True))


def test_tokens_needed_are_read_off_the_mean_curve(comparison):
    # The mean curve is 0.5 at 1000, 0.75 at 10000 and 0.9 at 100000 tokens.
    needed = comparison.tokens_needed("linearard", "linear", OUT, 0.625)
    assert needed == pytest.approx(10**3.5)
    assert comparison.tokens_needed("linearard", "linear", OUT, 0.5) == 1000
    assert comparison.tokens_needed("linearard", "linear", OUT, 0.95) is None
