"""Every layout of ranks against one plain process.

Compared are the loss, every gradient, and the weights after two steps.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.logits import relative_error
from tests.parity.cases import CASES, DROPOUT, THIRDS, run_reference
from tests.parity.compare import FP32_TOLERANCE, assert_step_matches, reference
from tests.parity.worker import Run, run_all
from tests.ranks import run_ranks

# Layouts are (dp, cp, tp). Every case runs on one process and along tp and cp alone.
EVERY_CASE = [(1, 1, 1), (1, 1, 2), (1, 2, 1)]
# On other layouts run cases that differ there. LoRA has grouped heads, "one-kv-head" has fewer K/V
# heads than tp ranks, "everything" has tied embeddings, every term of an objective, and cp ranks
# without a token, and "longred" has several streams.
LORA, ONE_KV_HEAD, EVERYTHING = "lora-qkvo-grouped", "weights-one-kv-head", "all-everything"
OTHER_LAYOUTS = {
    (2, 1, 1): [LORA, ONE_KV_HEAD, EVERYTHING],
    (1, 3, 1): [ONE_KV_HEAD, EVERYTHING],
    (1, 1, 4): [LORA, ONE_KV_HEAD, EVERYTHING],
    (1, 4, 1): [LORA, EVERYTHING],
    (2, 1, 2): [LORA, "all-longred"],
    (1, 2, 2): [ONE_KV_HEAD, EVERYTHING],
    (2, 2, 1): [LORA, "all-longred"],
    # Two of four tp ranks hold the same K/V heads, on each of two dp ranks.
    (2, 1, 4): [LORA],
    # Rows of padding on the last of three tp ranks, also where two cp ranks share the blocks.
    (1, 1, 3): [*THIRDS],
    (1, 2, 3): ["lora-thirds", "all-thirds"],
}
MATRIX = [
    *((layout, name) for layout in EVERY_CASE for name in CASES),
    *((layout, name) for layout, names in OTHER_LAYOUTS.items() for name in names),
]
LAYOUTS = [*EVERY_CASE, *OTHER_LAYOUTS]
# A mask depends on the number of the block, of the token and of the feature: on dp, cp and tp.
DROPOUT_LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 4), (1, 2, 2)]
DROPOUT_THIRDS_LAYOUTS = [(1, 1, 1), (1, 1, 3), (1, 2, 3)]


def cases_of(layout) -> list[str]:
    """Return the names of the cases that run on a layout."""
    names = [name for other, name in MATRIX if other == layout]
    names += ["dropout"] * (layout in DROPOUT_LAYOUTS)
    return names + ["dropout-thirds"] * (layout in DROPOUT_THIRDS_LAYOUTS)


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


@pytest.mark.parametrize("layout", DROPOUT_LAYOUTS[1:], ids=label)
def test_dropout_masks_do_not_depend_on_the_layout(layout, results):
    """The reference cannot draw the same masks, so layouts are compared with a single process."""
    single = results((1, 1, 1))["dropout"]
    assert_step_matches(results(layout)["dropout"], single, FP32_TOLERANCE)


@pytest.mark.parametrize("layout", DROPOUT_THIRDS_LAYOUTS[1:], ids=label)
def test_dropout_masks_do_not_depend_on_padding(layout, results):
    single = results((1, 1, 1))["dropout-thirds"]
    assert_step_matches(results(layout)["dropout-thirds"], single, FP32_TOLERANCE)


def test_dropout_changes_the_gradients(results, models):
    """Against the reference, which drops nothing: masks that are all ones would pass above."""
    ours = results((1, 1, 1))["dropout"]
    plain = run_reference(DROPOUT, models / "dropout", ours["start"])
    for name, gradient in plain["gradients"].items():
        # A share of 0.3 of the entries of every input is dropped. At first B is zero, and A's
        # gradient with it.
        if gradient.norm() > 0:
            assert relative_error(ours["gradients"][name], gradient) > 0.05, name
