"""Every layout of ranks against one plain process.

Compared are the loss, every gradient, and the weights after two steps.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from tests.logits import relative_error
from tests.parity.cases import CASES, DROPOUT, THIRDS, run_reference
from tests.parity.compare import (
    FP32_TOLERANCE,
    assert_step_matches,
    reference,
    trained_names,
)
from tests.parity.worker import Run, run_all
from tests.ranks import run_ranks

# Layouts are (dp, cp, tp). Every case runs on one process and, except those named here, along tp
# and along cp alone. Over tp ranks documents of any length are the same rows. Over cp ranks windows
# are also those of "lora-qk-windows", and tied embeddings, the KL of logits and language modelling
# those of "all-everything"; which weights a student starts from does not concern cp.
MOST_CASES = {
    (1, 1, 1): (),
    (1, 1, 2): ("all-short-documents", "lora-context-short"),
    (1, 2, 1): (
        "all-logits-tied",
        "all-language-modelling",
        "weights-own-student",
        "weights-v-only",
    ),
}
# On other layouts run cases that differ there. LoRA has grouped heads, "one-kv-head" has fewer K/V
# heads than tp ranks, "everything" has tied embeddings, every term of an objective, and cp ranks
# without a token, and "longred" has several streams.
LORA, ONE_KV_HEAD, EVERYTHING = "lora-qkvo-grouped", "weights-one-kv-head", "all-everything"
OTHER_LAYOUTS = {
    (2, 1, 1): [LORA, ONE_KV_HEAD, EVERYTHING],
    (1, 3, 1): [ONE_KV_HEAD, EVERYTHING],
    # (2, 1, 4) runs LORA.
    (1, 1, 4): [ONE_KV_HEAD, EVERYTHING],
    (1, 4, 1): [LORA, EVERYTHING],
    (2, 1, 2): [LORA],
    (1, 2, 2): [ONE_KV_HEAD, EVERYTHING],
    (2, 2, 1): [LORA, "all-longred"],
    # Two of four tp ranks hold the same K/V heads, on each of two dp ranks.
    (2, 1, 4): [LORA],
    # Rows of padding on the last of three tp ranks, also where two cp ranks share the blocks. There
    # LoRA is that of "dropout-thirds".
    (1, 1, 3): [*THIRDS],
    (1, 2, 3): ["all-thirds"],
}
# Weights that are divided over dp, over cp, and over dp with tensor-parallel slices.
DIVIDED_LAYOUTS = {
    (2, 1, 1): ["lora-divided", "all-divided"],
    (1, 2, 1): ["all-divided"],
    (2, 1, 2): ["lora-divided", "all-divided"],
}
MATRIX = [
    *((layout, name) for layout, no in MOST_CASES.items() for name in CASES if name not in no),
    *((layout, name) for layout, names in OTHER_LAYOUTS.items() for name in names),
    *((layout, name) for layout, names in DIVIDED_LAYOUTS.items() for name in names),
]
LAYOUTS = [*MOST_CASES, *OTHER_LAYOUTS]
# Blocks in a micro-batch: one process and the layouts with dp > 1 accumulate two micro-batches. The
# others have one, because gradients are accumulated above tp and cp.
MICRO_BATCHES = {layout: {2: 1}.get(layout[0], 4) for layout in LAYOUTS} | {(1, 1, 1): 2}
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

    @cache
    def of(layout):
        if not files[layout].exists():
            world = math.prod(layout)
            runs = [
                Run(other, cases_of(other), "float32", str(files[other]), MICRO_BATCHES[other])
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


@pytest.mark.parametrize("name", CASES)
def test_a_step_trains_what_autograd_reaches_from_the_weights_of_the_file(name, results, models):
    """The reference starts where the trainer starts, so the parity above does not see it."""
    start = results((1, 1, 1))[name]["start"]
    assert start.keys() == trained_names(name, reference(name, models, start)["reached"])
    file = load_file(models / name / "scaled" / "model.safetensors")
    for key, value in start.items():
        assert "lora_" in key or torch.equal(value, file[key]), key


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


@pytest.mark.parametrize("layout", DIVIDED_LAYOUTS, ids=label)
def test_divided_weights_change_no_bit(layout, results):
    names = {"lora-divided": LORA, "all-divided": EVERYTHING}
    # The others are compared with the reference alone.
    both = [name for name in DIVIDED_LAYOUTS[layout] if names[name] in results(layout)]
    assert both
    for name in both:
        divided, whole = results(layout)[name], results(layout)[names[name]]
        assert divided["loss"] == whole["loss"] and divided["norm"] == whole["norm"]
        for kind in ("gradients", "weights"):
            for key, value in divided[kind].items():
                assert torch.equal(value, whole[kind][key]), (name, kind, key)
