"""The statistics of the rows of a relation, and how partial sums of a row merge.

S are the student's scores and T are the teacher's, in nats (``op``). Five numbers describe any set
of columns j of a row i, and the numbers of two sets merge exactly (the online softmax of
FlashAttention, arXiv 2205.14135, with one more sum for the KL). So the columns of a row may be
spread over tiles, or over ranks:

    m_s = max_j S_ij    l_s = sum_j exp(S_ij - m_s)    (m_t, l_t likewise from T)
    a   = sum_j exp(T_ij - m_t) (T_ij - S_ij)
    KL_i = a / l_t + lse_s - lse_t,    lse = m + log l

Any m near the maximum serves as well, as long as l and a are relative to it. (The m of the Hopper
forward may lie below the maximum, by a factor of less than 2^60 of the exponentials.)

Ranks take the maximum of their m, ``rescale`` to it, add their sums, and ``finish``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RelationStatistics(NamedTuple):
    """The log-sum-exps of a row's scores and its KL, each [b, H, n] fp32 in nats.

    A row that sees no column has lse = -inf and kl = 0.

    Attributes:
        lse_s, lse_t: Log-sum-exps of the student's and of the teacher's scores.
        kl: KL(P_t || P_s).
    """

    lse_s: Tensor
    lse_t: Tensor
    kl: Tensor


class Partials(NamedTuple):
    """The five mergeable numbers of a row over some of its columns, each [b, H, n] fp32.

    A row that sees none of these columns has m = -inf and sums 0.

    Attributes:
        m_s, m_t: The maxima of the scores, or numbers near them, in nats.
        l_s, l_t: The sums of the exponentials.
        a: The sum of exp(T - m_t) (T - S).
    """

    m_s: Tensor
    l_s: Tensor
    m_t: Tensor
    l_t: Tensor
    a: Tensor


def rescale(partials: Partials, m_s: Tensor, m_t: Tensor) -> Partials:
    """Return the same sums relative to ``m_s`` and ``m_t``, which are not below the partials' m."""
    shrink_s, shrink_t = _shrink(partials.m_s, m_s), _shrink(partials.m_t, m_t)
    return Partials(
        m_s, partials.l_s * shrink_s, m_t, partials.l_t * shrink_t, partials.a * shrink_t
    )


def merge(p: Partials, q: Partials) -> Partials:
    """Return the partials over the union of two disjoint sets of columns of the same rows."""
    m_s, m_t = torch.maximum(p.m_s, q.m_s), torch.maximum(p.m_t, q.m_t)
    p, q = rescale(p, m_s, m_t), rescale(q, m_s, m_t)
    return Partials(m_s, p.l_s + q.l_s, m_t, p.l_t + q.l_t, p.a + q.a)


def finish(partials: Partials) -> RelationStatistics:
    """Return the statistics of rows whose partials cover all of their columns."""
    m_s, l_s, m_t, l_t, a = partials
    lse_s, lse_t = m_s + l_s.log(), m_t + l_t.log()
    kl = (a / l_t + (lse_s - lse_t)).masked_fill(l_t == 0, 0.0)
    return RelationStatistics(lse_s, lse_t, kl)


def _shrink(old: Tensor, new: Tensor) -> Tensor:
    """Return exp(old - new), and 0 where no column was met (-inf - -inf would be NaN)."""
    return (old - new).exp().masked_fill(old == float("-inf"), 0.0)
