"""Compare the results of two layouts, or of a layout and the plain reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.logits import relative_error
from tests.parity.cases import ALL_CASES, run_reference

# The reference is float64, so every difference is the trainer's: the rounding of fp32 (6e-8)
# through up to three layers, a softmax and its gradient, with sums over some 100 terms. Tensors are
# compared by norm. Observed at most 3e-6, except for the K bias (3e-5), whose terms cancel, because
# softmax does not see a shift of all keys. A missing or doubled exchange changes a gradient by 10 %
# or more.
FP32_TOLERANCE = 5e-5

_references: dict[tuple[str, str], dict] = {}


def reference(name: str, models: Path, start: dict, dtype: str = "float32") -> dict:
    """Return the reference's results for a case; computed once for weights loaded in ``dtype``."""
    if (name, dtype) not in _references:
        _references[name, dtype] = run_reference(ALL_CASES[name], models / name, start)
    return _references[name, dtype]


def trained_names(name: str, reached: set[str]) -> set[str]:
    """Return what a case must train, of the weights and biases that its loss depends on."""
    case = ALL_CASES[name]
    if case.mode == "all":
        return reached
    chosen = {f"{kind}_proj" for kind in case.targets}
    names = {x for x in reached if x.partition("self_attn.")[2].rpartition(".")[0] in chosen}
    if case.mode == "weights":
        return names
    stems = {x.removesuffix("weight") for x in names if x.endswith(".weight")}
    return {f"{stem}lora_{part}" for stem in stems for part in "AB"}


def assert_step_matches(ours: dict, plain: dict, tolerance: float) -> None:
    """Compare loss, parts, layers, norms, every gradient, and every weight after both steps."""
    for key in ("loss", "parts", "norm", "kinds"):
        assert ours[key] == pytest.approx(plain[key], rel=tolerance), key
    # V of the first layer is the same in teacher and student, so that its KL is rounding alone.
    assert ours["layers"].keys() == plain["layers"].keys()
    for key, values in plain["layers"].items():
        assert ours["layers"][key] == pytest.approx(values, rel=tolerance, abs=5e-6), key
    assert_close(ours["gradients"], plain["gradients"], "gradient", tolerance)
    assert_close(ours["weights"], plain["weights"], "weight after both steps", tolerance)


def assert_close(actual: dict, expected: dict, what: str, tolerance: float) -> None:
    """Compare tensors by relative error in norm; the message names the tensor and an index."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        worst = (actual[name].double() - value.double()).abs().flatten().argmax().item()
        assert error < tolerance, f"{what} of {name} is off by {error:.2e}, most at {worst}"
