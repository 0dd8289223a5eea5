"""The checked arguments of a relation, shared by every back end."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .mask import IntervalMask

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Operands:
    """One relation: rows [b, Ha, n, d], columns [b, Hb, m, d], of student (s) and teacher (t).

    Row head h uses column head h // group. In a self relation the columns are the rows.
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
        return self.rows_s.shape[1] // self.cols_s.shape[1]

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """float32, or float64 for float64 operands (pure torch only)."""
        widest = torch.promote_types(self.rows_s.dtype, self.rows_t.dtype)
        return torch.promote_types(widest, torch.float32)


def check_operands(
    rows_s: Tensor,
    rows_t: Tensor,
    cols_s: Tensor | None,
    cols_t: Tensor | None,
    mask: IntervalMask,
    scale_s: float | None,
    scale_t: float | None,
) -> Operands:
    """Fill in defaults; raise ValueError, in one sentence, for anything the kernels would misread.

    Scales default to head_dim ** -0.5 of each side and must be positive.
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
    """Student and teacher agree in everything but head_dim; rows and columns fit each other."""
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
