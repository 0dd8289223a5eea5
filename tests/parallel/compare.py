"""Comparing the results of two layouts, or of a layout and the plain reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.cases import CASES, run_reference

# The reference is float64, so what differs is ours: fp32 rounding (6e-8) through three layers, a
# softmax and its gradient, with sums over some 100 terms. Compared by norm over each tensor;
# observed at most 3e-6, but for the K bias (3e-5), whose terms cancel: softmax does not see a shift
# of all keys. An exchange that is missing or doubled changes a gradient by 10 % or more.
FP32_TOLERANCE = 5e-5

_references: dict[tuple[str, str], dict] = {}


def reference(name: str, models: Path, start: dict, dtype: str = "float32") -> dict:
    """The plain reference's results for a case, computed once for weights loaded in ``dtype``."""
    if (name, dtype) not in _references:
        _references[name, dtype] = run_reference(CASES[name], models / name, start)
    return _references[name, dtype]


def assert_step_matches(ours: dict, plain: dict, tolerance: float) -> None:
    """Loss, its parts, the gradient norm, every gradient, every weight after three steps."""
    for key in ("loss", "parts", "norm"):
        assert ours[key] == pytest.approx(plain[key], rel=tolerance), key
    assert_close(ours["gradients"], plain["gradients"], "gradient", tolerance)
    assert_close(ours["weights"], plain["weights"], "weight after three steps", tolerance)


def assert_close(actual: dict, expected: dict, what: str, tolerance: float) -> None:
    """Relative error in norm, tensor by tensor; the message names tensor and index."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        worst = (actual[name].double() - value.double()).abs().flatten().argmax().item()
        assert error < tolerance, f"{what} of {name} is off by {error:.2e}, most at {worst}"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-12))
