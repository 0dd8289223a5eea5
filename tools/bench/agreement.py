"""Check that two ways of computing one result agree, before a benchmark times them."""

from __future__ import annotations

import torch

from megalard.parallel.mesh import Axis

# The rounding of sums in bf16, which is far below the effect of a wrong mask or a lost part.
_RELATIVE_ERROR = 2e-2


def check_agreement(
    expected: list[torch.Tensor], actual: list[torch.Tensor], name: str, axis: Axis
) -> None:
    """Refuse tensors that differ by more than rounding, in their L2 norm.

    Args:
        name: how ``actual`` was computed, for the error message.

    Raises:
        AssertionError: naming the rank and the first such tensor.
    """
    for number, (a, b) in enumerate(zip(expected, actual, strict=True)):
        error = float((a.double() - b.double()).norm() / a.double().norm())
        assert error < _RELATIVE_ERROR, (
            f"result {number} of {name} differs from the expected result by {error:.1e} on rank "
            f"{axis.rank} of {axis.size}"
        )
