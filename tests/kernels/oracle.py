"""Dense float64 relation KL, and the cases that the kernels are compared with it on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megalard.kernels.relation_kl import IntervalMask, chunk_mask, segment_bounds


@dataclass(frozen=True)
class Case:
    """One relation: shapes, the token layout and the dtype.

    ``layout`` names a row of segment ids of length ``total``; rows and columns are the chunks of it
    that start at ``row_offset`` and ``col_offset``. ``cols_heads`` None: the self relation.
    """

    n: int
    d_s: int
    d_t: int
    m: int = 0
    b: int = 2
    heads: int = 2
    cols_heads: int | None = None
    layout: str = "single"
    causal: bool = True
    row_offset: int = 0
    col_offset: int = 0
    dtype: torch.dtype = torch.float32
    scale_s: float | None = None
    scale_t: float | None = None

    def __str__(self):
        heads = f"{self.heads}" if self.cols_heads is None else f"{self.heads}/{self.cols_heads}"
        order = "causal" if self.causal else "full"
        chunk = (
            f"+{self.row_offset}x{self.m or self.n}+{self.col_offset}" if self.cols_heads else ""
        )
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.layout}-{order}-n{self.n}{chunk}-h{heads}-d{self.d_s},{self.d_t}-{kind}"

    @property
    def total(self) -> int:
        return max(self.row_offset + self.n, self.col_offset + (self.m or self.n))


def segment_ids(layout: str, b: int, s: int) -> Tensor:
    """[b, s] ids, negative = padding; rows of a batch differ where the layout allows it."""
    ids_bs = torch.zeros(b, s, dtype=torch.int64)
    for i in range(b):
        pad = min(s - 1, s // 3 + 5 * i)
        if layout in ("left_pad", "both_pad"):
            ids_bs[i, :pad] = -1
        if layout in ("right_pad", "both_pad"):
            ids_bs[i, s - pad // 2 :] = -1
        if layout == "all_pad" and i == 0:
            ids_bs[i] = -1
        if layout in ("packed", "packed_pad"):
            length = max(1, s // (3 + 2 * i))
            ids_bs[i] = (torch.arange(s) + 3 * i) // length
            if layout == "packed_pad":
                ids_bs[i][ids_bs[i] % 3 == 1] = -1
    return ids_bs


def dense_allowed(ids_bs: Tensor, causal: bool) -> Tensor:
    """[b, s, s] bool: same document, not padding, and not later if causal."""
    same = (ids_bs[:, :, None] == ids_bs[:, None, :]) & (ids_bs[:, :, None] >= 0)
    return same.tril() if causal else same


@dataclass
class Problem:
    """Inputs of a case on one device, with the oracle's answers (float64, on the CPU)."""

    student: list[Tensor]  # rows, and columns unless self
    teacher: list[Tensor]
    mask: IntervalMask
    row_weight: Tensor
    kl: Tensor
    lse_s: Tensor
    lse_t: Tensor
    grads: list[Tensor]

    @property
    def operands(self) -> list[Tensor | None]:
        """In the order of `relation_kl`."""
        pad = [None] * (2 - len(self.student))
        (rows_s, cols_s), (rows_t, cols_t) = self.student + pad, self.teacher + pad
        return [rows_s, rows_t, cols_s, cols_t]

    @property
    def untouched(self) -> list[Tensor]:
        """[b, 1, length] per student operand: vectors that no allowed pair contains."""
        mask = self.mask.to("cpu")
        rows = (mask.col_lo_bn >= mask.col_hi_bn)[:, None]
        cols = (mask.row_lo_bm >= mask.row_hi_bm)[:, None]
        return [rows & cols] if len(self.student) == 1 else [rows, cols]


def make_problem(case: Case, device: str = "cpu", bshd: bool = False, seed: int = 0) -> Problem:
    """Random operands; student and teacher share a part, as in distillation.

    Vectors are short enough that no row is saturated by its diagonal, where P_s - P_t would cancel.
    """
    generator = torch.Generator().manual_seed(seed)
    m = case.m or case.n

    def side(heads: int, length: int) -> list[Tensor]:
        shape = (case.b, length, heads) if bshd else (case.b, heads, length)
        d = max(case.d_s, case.d_t)
        common = 0.6 * torch.randn(*shape, d, generator=generator)
        own = common + 0.4 * torch.randn(*shape, d, generator=generator)
        pair = [common[..., : case.d_t], own[..., : case.d_s]]
        # The slices stay strided in n, h and b; bshd storage is read through a transposed view.
        pair = [x.to(case.dtype).to(device) for x in pair]
        return [x.transpose(1, 2) if bshd else x for x in pair]

    sides = [side(case.heads, case.n)]
    if case.cols_heads is not None:
        sides.append(side(case.cols_heads, m))
    teacher, student = ([x[k] for x in sides] for k in (0, 1))

    ids_bs = segment_ids(case.layout, case.b, case.total)
    rows = slice(case.row_offset, case.row_offset + case.n)
    cols = slice(case.col_offset, case.col_offset + m)
    allowed = dense_allowed(ids_bs, case.causal)[:, rows, cols]
    mask = chunk_mask(
        *segment_bounds(ids_bs),
        row_offset=rows.start,
        n=case.n,
        col_offset=cols.start,
        m=m,
        causal=case.causal,
    )
    row_weight = torch.randn(case.b, case.heads, case.n, generator=generator)

    leaves = [x.detach().double().cpu().requires_grad_() for x in student]
    lse_s, logp_s = _log_softmax(leaves, allowed, case.scale_s)
    lse_t, logp_t = _log_softmax([x.double().cpu() for x in teacher], allowed, case.scale_t)
    pairs = allowed[:, None]
    kl = torch.where(pairs, logp_t.exp() * (logp_t - logp_s), 0.0).sum(-1)
    grads = torch.autograd.grad((kl * row_weight).sum(), leaves)
    return Problem(
        student,
        teacher,
        mask.to(device),
        row_weight.to(device),
        kl.detach(),
        lse_s.detach(),
        lse_t,
        list(grads),
    )


def _log_softmax(sides: list[Tensor], allowed: Tensor, scale: float | None):
    rows, cols = sides[0], sides[-1]
    cols = cols.repeat_interleave(rows.shape[1] // cols.shape[1], dim=1)
    scores = rows @ cols.mT * (rows.shape[3] ** -0.5 if scale is None else scale)
    # Hidden pairs get a finite score far below all others, so that empty rows stay differentiable.
    hidden = ~allowed[:, None]
    lse = scores.masked_fill(hidden, -1e300).logsumexp(-1)
    lse = lse.masked_fill(~allowed.any(-1)[:, None], float("-inf"))
    return lse, (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).masked_fill(hidden, 0.0)


def relative_error(actual: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """L2 norm of the difference over that of ``expected``, or over ``floor`` if that is larger."""
    difference = (actual.detach().double().cpu() - expected).norm().item()
    return difference / max(expected.norm().item(), floor)
