"""A dense relation KL in float64, and the cases on which the kernels are compared with it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megalard.kernels.relation_kl import IntervalMask, chunk_mask, segment_bounds


@dataclass(frozen=True)
class Case:
    """One relation: shapes, the layout of tokens, the dtype.

    Attributes:
        n, m: Number of rows and columns per sequence; m = 0 means n.
        d_s, d_t: head_dim of student and teacher.
        b: Number of sequences.
        heads, cols_heads: Number of row and column heads; cols_heads = None is the self relation.
        layout: Where documents and padding lie in the sequence of ``total`` tokens, see
            ``segment_ids``.
        causal: Whether a row sees nothing later than itself.
        row_offset, col_offset: Where the chunks of rows and columns start in the sequence.
        dtype: dtype of the operands.
        scale_s, scale_t: Factors of the scores; None means the default.
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
        """The number of tokens of the sequence that rows and columns are chunks of."""
        return max(self.row_offset + self.n, self.col_offset + (self.m or self.n))


def segment_ids(layout: str, b: int, s: int) -> Tensor:
    """Return the id of each token's document, int64 [b, s]; negative ids are padding.

    The sequences of a batch differ where the layout allows it.
    """
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
    """Return the allowed pairs, bool [b, s, s]: same document, no padding, not later if causal."""
    same = (ids_bs[:, :, None] == ids_bs[:, None, :]) & (ids_bs[:, :, None] >= 0)
    return same.tril() if causal else same


@dataclass
class Problem:
    """The inputs of a case on one device, with the results in float64 on the CPU.

    Attributes:
        student, teacher: The rows, and the columns unless this is a self relation.
        row_weight: fp32 [b, heads, n].
        allowed: The pairs that the mask must allow, bool [b, n, m].
        kl, lse_s, lse_t: [b, heads, n].
        grads: The gradients of sum(row_weight * kl), one per tensor of ``student``.
    """

    student: list[Tensor]
    teacher: list[Tensor]
    mask: IntervalMask
    allowed: Tensor
    row_weight: Tensor
    kl: Tensor
    lse_s: Tensor
    lse_t: Tensor
    grads: list[Tensor]

    @property
    def operands(self) -> list[Tensor | None]:
        """rows_s, rows_t, cols_s, cols_t, as ``relation_kl`` takes them."""
        pad = [None] * (2 - len(self.student))
        (rows_s, cols_s), (rows_t, cols_t) = self.student + pad, self.teacher + pad
        return [rows_s, rows_t, cols_s, cols_t]

    @property
    def unpaired(self) -> list[Tensor]:
        """The vectors that no allowed pair contains, bool [b, 1, length] per student operand."""
        rows, cols = (~self.allowed.any(dim)[:, None] for dim in (2, 1))
        return [rows & cols] if len(self.student) == 1 else [rows, cols]


def make_problem(
    case: Case,
    device: str = "cpu",
    bshd: bool = False,
    seed: int = 0,
    weight_of_rows: float | None = None,
) -> Problem:
    """Return random operands of a case, with the results that the kernels must give.

    Student and teacher share a part, as in distillation. Vectors are so short that no row is
    saturated by its diagonal, where P_s - P_t would cancel.

    Args:
        case: The case.
        device: Device of the inputs.
        bshd: Whether the operands are transposed views of [b, length, heads, d] storage.
        seed: Seed of the operands and weights.
        weight_of_rows: The weight of every row; None draws another one for each.
    """
    generator = torch.Generator().manual_seed(seed)
    m = case.m or case.n

    def side(heads: int, length: int) -> list[Tensor]:
        shape = (case.b, length, heads) if bshd else (case.b, heads, length)
        d = max(case.d_s, case.d_t)
        teacher = 0.6 * torch.randn(*shape, d, generator=generator)
        student = teacher + 0.4 * torch.randn(*shape, d, generator=generator)
        pair = [teacher[..., : case.d_t], student[..., : case.d_s]]
        # The slices stay strided in all dimensions but the last.
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
    if weight_of_rows is not None:
        row_weight.fill_(weight_of_rows)

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
        allowed,
        row_weight.to(device),
        kl.detach(),
        lse_s.detach(),
        lse_t,
        list(grads),
    )


def _log_softmax(
    sides: list[Tensor], allowed: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each row, and log P of each pair (0 where it is not allowed)."""
    rows, cols = sides[0], sides[-1]
    cols = cols.repeat_interleave(rows.shape[1] // cols.shape[1], dim=1)
    scores = rows @ cols.mT * (rows.shape[3] ** -0.5 if scale is None else scale)
    # Hidden pairs get a finite score far below all others, so that empty rows stay differentiable.
    hidden = ~allowed[:, None]
    lse = scores.masked_fill(hidden, -1e300).logsumexp(-1)
    lse = lse.masked_fill(~allowed.any(-1)[:, None], float("-inf"))
    return lse, (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).masked_fill(hidden, 0.0)


def relative_error(actual: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Return |actual - expected| / max(|expected|, floor), with L2 norms."""
    difference = (actual.detach().double().cpu() - expected).norm().item()
    return difference / max(expected.norm().item(), floor)
