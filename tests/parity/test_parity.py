"""Every layout of ranks against one plain process.

Compared are the loss, every gradient, and the weights after three steps.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.logits import relative_error
from tests.parity.cases import CASES, CORE, DROPOUT, run_reference
from tests.parity.compare import FP32_TOLERANCE, assert_step_matches, reference
from tests.parity.worker import Run, run_all
from tests.ranks import run_ranks

# Layouts are (dp, cp, tp). Every case runs on these, and a case of each kind on the others.
EVERY_CASE = [(1, 1, 1), (1, 1, 2), (1, 2, 1)]
CORE_CASES = [
    (2, 1, 1),
    (2, 1, 2),
    (1, 1, 4),
    (2, 1, 4),
    (1, 3, 1),
    (1, 4, 1),
    (1, 2, 2),
    (2, 2, 1),
]
# Several streams, on a layout of each kind of product.
STREAMS = [((2, 1, 2), "all-longred"), ((2, 2, 1), "all-longred")]
MATRIX = [
    *((layout, name) for layout in EVERY_CASE for name in CASES),
    *((layout, name) for layout in CORE_CASES for name in CORE),
    *STREAMS,
]
LAYOUTS = EVERY_CASE + CORE_CASES


def cases_of(layout) -> list[str]:
    """Return the names of the cases that run on a layout."""
    return [name for other, name in MATRIX if other == layout] + ["dropout"]


def label(value) -> str:
    """Return the name of a case or a layout in a test's id."""
    return value if isinstance(value, str) else "dp{}-cp{}-tp{}".format(*value)


@pytest.fixture(scope="session")
def results(models):
    """A function that returns the results of a layout.

    All layouts with the same number of ranks run in the same processes, once.
    """
    files = {layout: models / f"results-{label(layout)}.pt" for layout in LAYOUTS}

    def of(layout):
        if not files[layout].exists():
            world = math.prod(layout)
            runs = [
                Run(other, cases_of(other), "float32", str(files[other]))
                for other in LAYOUTS
                if math.prod(other) == world
            ]
            run_ranks(world, run_all, str(models), "cpu", runs)
        return torch.load(files[layout])

    return of


@pytest.mark.parametrize(("layout", "name"), MATRIX, ids=label)
def test_step_matches_one_process(layout, name, results, models):
    ours = results(layout)[name]
    assert_step_matches(ours, reference(name, models, ours["start"]), FP32_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
def test_dropout_masks_do_not_depend_on_the_layout(layout, results):
    """The reference cannot draw the same masks, so layouts are compared with a single process."""
    single = results((1, 1, 1))["dropout"]
    assert_step_matches(results(layout)["dropout"], single, FP32_TOLERANCE)


def test_dropout_changes_the_gradients(results, models):
    """Against the reference, which drops nothing: masks that are all ones would pass above."""
    ours = results((1, 1, 1))["dropout"]
    plain = run_reference(DROPOUT, models / "dropout", ours["start"])
    for name, gradient in plain["gradients"].items():
        # A share of 0.3 of the entries of every input is dropped. At first B is zero, and A's
        # gradient with it.
        if gradient.norm() > 0:
            assert relative_error(ours["gradients"][name], gradient) > 0.05, name
