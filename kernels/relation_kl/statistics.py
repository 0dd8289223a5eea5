"""Per-row statistics of a relation, and how parts of a row merge.

A row whose columns are spread over tiles or ranks is described by five sums that merge exactly
(the online softmax of FlashAttention, arXiv 2205.14135, with one more sum for the KL):

    m_s = max_j S_ij    l_s = sum_j exp(S_ij - m_s)    (m_t, l_t likewise from T)
    a   = sum_j exp(T_ij - m_t) (T_ij - S_ij)
    KL_i = a / l_t + lse_s - lse_t,    lse = m + log l

Any m near the maximum serves as well (the Hopper forward's may lie below it, by less than 60 bits
of the exponentials): what counts is that l and a are relative to it.

Ranks take the maximum of their m, `rescale` to it, add their sums, and `finish`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RelationStatistics(NamedTuple):
    """Log-sum-exp of student and teacher scores and KL(teacher || student), nats, [b, H, n] fp32.

    Rows that see no column have lse = -inf and kl = 0.
    """

    lse_s: Tensor
    lse_t: Tensor
    kl: Tensor


class Partials(NamedTuple):
    """The five sums over some of a row's columns, each [b, H, n] fp32, scores in nats.

    m_s, m_t are the maxima or near them.

    Rows that see none of these columns have m = -inf and sums 0.
    """

    m_s: Tensor
    l_s: Tensor
    m_t: Tensor
    l_t: Tensor
    a: Tensor


def rescale(partials: Partials, m_s: Tensor, m_t: Tensor) -> Partials:
    """The same sums, relative to the maxima ``m_s``, ``m_t`` (no smaller than its own)."""
    shrink_s, shrink_t = _shrink(partials.m_s, m_s), _shrink(partials.m_t, m_t)
    return Partials(
        m_s, partials.l_s * shrink_s, m_t, partials.l_t * shrink_t, partials.a * shrink_t
    )


def merge(p: Partials, q: Partials) -> Partials:
    """Partials over the union of two disjoint sets of columns of the same rows."""
    m_s, m_t = torch.maximum(p.m_s, q.m_s), torch.maximum(p.m_t, q.m_t)
    p, q = rescale(p, m_s, m_t), rescale(q, m_s, m_t)
    return Partials(m_s, p.l_s + q.l_s, m_t, p.l_t + q.l_t, p.a + q.a)


def finish(partials: Partials) -> RelationStatistics:
    """Log-sum-exps and KL once the partials cover every column of their rows."""
    m_s, l_s, m_t, l_t, a = partials
    lse_s, lse_t = m_s + l_s.log(), m_t + l_t.log()
    kl = (a / l_t + (lse_s - lse_t)).masked_fill(l_t == 0, 0.0)
    return RelationStatistics(lse_s, lse_t, kl)


def _shrink(old: Tensor, new: Tensor) -> Tensor:
    """exp(old - new), and 0 for an empty part (where -inf - -inf would be NaN)."""
    return (old - new).exp().masked_fill(old == float("-inf"), 0.0)
