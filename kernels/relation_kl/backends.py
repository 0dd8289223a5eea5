"""The back ends of the relation, fastest first, and the choice between them.

A back end is a module with the names of ``BackEnd``. To add one, write such a module and put its
name into ``BACKENDS``, before every back end that it is faster than.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import torch_reference
from .hopper import backend as hopper
from .operands import Operands
from .statistics import Partials, RelationStatistics
from .triton import backend as triton


class BackEnd(Protocol):
    """The names that a module must have to be a back end.

    A reason is one sentence that names the value at fault, without the final period.

    Attributes:
        NAME: The name in messages.
        FAMILY: The value of the public argument ``backend=`` that allows this back end.
    """

    NAME: str
    FAMILY: str

    def why_not_on(self, device: torch.device) -> str | None:
        """Return why the back end serves no call on a device, or None if it serves some."""

    def why_not(self, op: Operands, *, backward: bool, by_name: bool) -> str | None:
        """Return why the back end does not serve a call, or None if it does.

        Args:
            op: The operands of the call.
            backward: Whether the call is for gradients.
            by_name: Whether the caller asks for the back end's family by name.
        """

    def forward(self, op: Operands, partial: bool) -> RelationStatistics | Partials:
        """Return the statistics of each row, or its partials over the given columns."""

    def backward(
        self,
        op: Operands,
        lse_s: Tensor,
        lse_t: Tensor,
        row_weight: Tensor | None,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of sum_i w_i KL_i: (of the rows, of the columns or None if self).

        Args:
            op: The operands of the call.
            lse_s, lse_t: [b, Ha, n] in the accumulation dtype, nats, any strides.
            row_weight: [b, Ha, n] in the accumulation dtype, any strides; None means 1.
            out_dtype: The dtype that the caller converts the gradients to. A back end may return
                another one that holds more bits.
        """


BACKENDS: tuple[BackEnd, ...] = (hopper, triton, torch_reference)


def choose(op: Operands, family: str | None, *, backward: bool) -> BackEnd:
    """Return the first back end of a family that serves a call; None allows every family.

    Raises:
        ValueError: The family does not exist, or none of its back ends serves the call.
    """
    families = list(dict.fromkeys(backend.FAMILY for backend in BACKENDS))
    if family is not None and family not in families:
        names = ", ".join(map(repr, families))
        raise ValueError(f"backend must be {names} or None, not {family!r}")
    reason = None
    for backend in BACKENDS:
        if family in (None, backend.FAMILY):
            reason = backend.why_not(op, backward=backward, by_name=family is not None)
            if reason is None:
                return backend
    # The last back end of a family serves the most calls, so its reason is the one to act on.
    raise ValueError(f"backend {family!r} cannot serve this call: {reason}")


def describe_kernels(device: torch.device) -> str:
    """Return the name of the fastest back end on a device, and why faster ones do not serve it.

    The reasons are left out on a CPU, where nobody expects another back end.
    """
    reasons: list[str] = []
    for backend in BACKENDS:
        reason = backend.why_not_on(device)
        if reason is None:
            is_expected = not reasons or device.type == "cpu"
            return backend.NAME if is_expected else f"{backend.NAME} ({'; '.join(reasons)})"
        reasons.append(reason)
    raise ValueError(f"no back end of the relation serves {device}: {'; '.join(reasons)}")
