"""Every parallel layout against one plain process: loss, every gradient, weights after 3 steps."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.cases import CASES
from tests.parallel.compare import FP32_TOLERANCE, assert_step_matches, reference
from tests.parallel.worker import run_all
from tests.ranks import run_ranks

LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]


@pytest.fixture(scope="session", params=LAYOUTS, ids=lambda layout: f"tp{layout[0]}-dp{layout[1]}")
def results(request, models):
    tp, dp = request.param
    file = models / f"results-tp{tp}-dp{dp}.pt"
    run_ranks(tp * dp, run_all, str(models), tp, "cpu", "float32", str(file))
    return torch.load(file)


@pytest.mark.parametrize("name", CASES)
def test_step_matches_one_process(name, results, models):
    ours = results[name]
    assert_step_matches(ours, reference(name, models, ours["start"]), FP32_TOLERANCE)


def test_dropout_masks_do_not_depend_on_the_layout(results, models):
    """The reference cannot draw our masks: every layout is compared with the first, one process."""
    single = torch.load(models / "results-tp1-dp1.pt")["dropout"]
    assert_step_matches(results["dropout"], single, FP32_TOLERANCE)
