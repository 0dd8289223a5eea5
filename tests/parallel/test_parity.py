"""Every parallel layout against one plain process: loss, every gradient, weights after 3 steps."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.cases import CASES
from tests.parallel.compare import FP32_TOLERANCE, assert_step_matches, reference
from tests.parallel.worker import run_all
from tests.ranks import run_ranks

# (dp, cp, tp)
LAYOUTS = [
    (1, 1, 1),
    (2, 1, 1),
    (1, 1, 2),
    (2, 1, 2),
    (1, 1, 4),
    (2, 1, 4),
    (1, 2, 1),
    (1, 3, 1),
    (1, 4, 1),
    (1, 2, 2),
    (2, 2, 1),
]


@pytest.fixture(scope="session", params=LAYOUTS, ids=lambda axes: "dp{}-cp{}-tp{}".format(*axes))
def results(request, models):
    dp, cp, tp = request.param
    file = models / f"results-dp{dp}-cp{cp}-tp{tp}.pt"
    run_ranks(dp * cp * tp, run_all, str(models), tp, cp, "cpu", "float32", str(file))
    return torch.load(file)


@pytest.mark.parametrize("name", CASES)
def test_step_matches_one_process(name, results, models):
    ours = results[name]
    assert_step_matches(ours, reference(name, models, ours["start"]), FP32_TOLERANCE)


def test_dropout_masks_do_not_depend_on_the_layout(results, models):
    """The reference cannot draw our masks: every layout is compared with the first, one process."""
    single = torch.load(models / "results-dp1-cp1-tp1.pt")["dropout"]
    assert_step_matches(results["dropout"], single, FP32_TOLERANCE)
