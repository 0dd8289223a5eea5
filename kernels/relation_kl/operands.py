"""The checked arguments of a relation, which every back end takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .mask import IntervalMask

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Operands:
    """One relation of the student (``_s``) and the same relation of the teacher (``_t``).

    Attributes:
        rows_s, rows_t: [b, Ha, n, d]; d may differ between student and teacher.
        cols_s, cols_t: [b, Hb, m, d]; row head h meets column head h // group.
        mask: Which pairs are allowed.
        scale_s, scale_t: Positive factors of the scores.
        is_self: Whether this is a self relation, whose columns are the rows.
    """

    rows_s: Tensor
    rows_t: Tensor
    cols_s: Tensor
    cols_t: Tensor
    mask: IntervalMask
    scale_s: float
    scale_t: float
    is_self: bool

    @property
    def group(self) -> int:
        """The number of row heads per column head."""
        return self.rows_s.shape[1] // self.cols_s.shape[1]

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The dtype of sums: float32, or float64 for float64 operands (plain torch only)."""
        widest = torch.promote_types(self.rows_s.dtype, self.rows_t.dtype)
        return torch.promote_types(widest, torch.float32)

    def with_unit_strides(self) -> Operands:
        """Return the same operands, with a copy of each whose last dimension is not contiguous."""
        operands = {name: getattr(self, name) for name in ("rows_s", "rows_t", "cols_s", "cols_t")}
        if all(x.stride(3) == 1 for x in operands.values()):
            return self
        copies = {k: x if x.stride(3) == 1 else x.contiguous() for k, x in operands.items()}
        return replace(self, **copies)


def check_operands(
    rows_s: Tensor,
    rows_t: Tensor,
    cols_s: Tensor | None,
    cols_t: Tensor | None,
    mask: IntervalMask,
    scale_s: float | None,
    scale_t: float | None,
) -> Operands:
    """Check the arguments of a public operation and fill in the defaults.

    The arguments are the same as in ``op.relation_kl``.

    Raises:
        ValueError: The kernels would misread the arguments; the message is one sentence.
    """
    if (cols_s is None) != (cols_t is None):
        raise ValueError("student and teacher columns must both be given, or neither")
    is_self = cols_s is None
    if is_self:
        cols_s, cols_t = rows_s, rows_t
    named = {"rows_s": rows_s, "rows_t": rows_t, "cols_s": cols_s, "cols_t": cols_t}
    for name, x in named.items():
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must be a non-empty [b, heads, length, head_dim], not {list(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be floating point of at most 64 bits, not {x.dtype}")
        if x.shape[3] > MAX_HEAD_DIM:
            raise ValueError(f"{name} has head_dim {x.shape[3]}, above {MAX_HEAD_DIM}")
        if x.device != rows_s.device:
            raise ValueError(f"{name} is on {x.device}, rows_s on {rows_s.device}")
    _check_sides(rows_s, rows_t, cols_s, cols_t)
    expected = (rows_s.shape[0], rows_s.shape[2], cols_s.shape[2])
    if (mask.b, mask.n, mask.m) != expected:
        raise ValueError(
            f"the mask is for (b, n, m) = {(mask.b, mask.n, mask.m)}, the operands are {expected}"
        )
    if mask.device != rows_s.device:
        raise ValueError(f"the mask is on {mask.device}, the operands on {rows_s.device}")
    scale_s = rows_s.shape[3] ** -0.5 if scale_s is None else float(scale_s)
    scale_t = rows_t.shape[3] ** -0.5 if scale_t is None else float(scale_t)
    if not (0 < scale_s < float("inf") and 0 < scale_t < float("inf")):
        raise ValueError(f"scales must be positive and finite, not {scale_s} and {scale_t}")
    return Operands(rows_s, rows_t, cols_s, cols_t, mask, scale_s, scale_t, is_self)


def _check_sides(rows_s: Tensor, rows_t: Tensor, cols_s: Tensor, cols_t: Tensor) -> None:
    """Raise ValueError unless rows fit columns, and the student fits the teacher.

    Student and teacher may differ in head_dim and dtype.
    """
    for side, rows, cols in (("student", rows_s, cols_s), ("teacher", rows_t, cols_t)):
        if rows.shape[3] != cols.shape[3]:
            raise ValueError(
                f"{side} rows and columns differ in head_dim: {rows.shape[3]} and {cols.shape[3]}"
            )
        if rows.dtype != cols.dtype:
            raise ValueError(f"{side} rows are {rows.dtype}, its columns {cols.dtype}")
        if rows.shape[0] != cols.shape[0]:
            raise ValueError(
                f"{side} rows and columns differ in batch: {rows.shape[0]} and {cols.shape[0]}"
            )
        if rows.shape[1] % cols.shape[1]:
            raise ValueError(
                f"{rows.shape[1]} {side} row heads are not a multiple of {cols.shape[1]} "
                "column heads"
            )
    for name, x_s, x_t in (("rows", rows_s, rows_t), ("columns", cols_s, cols_t)):
        if x_s.shape[:3] != x_t.shape[:3]:
            raise ValueError(
                f"student and teacher {name} differ in [b, heads, length]: "
                f"{list(x_s.shape[:3])} and {list(x_t.shape[:3])}"
            )
